"""Which checkpoint a training goes on from when some are damaged: the last whole one, said; or an error that
says so; never a damaged one, and never a fresh start in silence.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import make_columns, make_foundation, tiny_train

from repfusion.locks import locked
from repfusion.runs.completion import latest_whole
from repfusion.runs.folder import complete_checkpoints
from repfusion.runs.seals import Seal
from repfusion.train import TrainConfig, train
from repfusion.training.choice import choose, share_of
from repfusion.training.distributed import init_process_group

NUM_TRIES = 200
LAST, BEFORE = "step_00000004", "step_00000002"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainConfig]:
    """Two trainings, complete: four steps with checkpoints that can be resumed from after two and four."""
    root = tmp_path_factory.mktemp("choice")
    world = make_foundation(root / "weights"), make_columns(root / "data")
    one = tiny_train(*world, root / "one")
    other = one.model_copy(update={"output_dir": root / "other", "seed": 1})
    train(one), train(other)
    return one, other


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def zero(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = rng.randint(start + 1, len(data))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def flip_one_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(source: Path) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: shutil.copyfile(source, path)


def damage_something(checkpoint: Path, other_training: Path, other_step: Path, rng: random.Random) -> bool:
    """Whether a random file of a checkpoint holds other bytes now."""
    path = rng.choice(sorted(one for one in checkpoint.rglob("*") if one.is_file()))
    name, before = path.relative_to(checkpoint), path.read_bytes()
    ways = [truncate, zero, flip_one_bit, remove, swap(other_training / name), swap(other_step / name)]
    rng.choice(ways)(path, rng)
    return not path.exists() or path.read_bytes() != before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_tries", [50, pytest.param(NUM_TRIES, marks=pytest.mark.slow)])
def test_random_damage_is_never_resumed_from(configs, tmp_path: Path, num_tries: int):
    """Of one checkpoint, of the other, of both: the last whole one is found whenever there is one."""
    init_process_group()
    one, other = (config.output_dir / "checkpoints" for config in configs)
    written = {name: contents(one / name) for name in (LAST, BEFORE)}
    chosen: list[str | None] = []
    for number in range(num_tries):
        rng, said = random.Random(number), []
        root = tmp_path / str(number)
        shutil.copytree(one, root)
        damaged = {
            name
            for name, step in ((LAST, BEFORE), (BEFORE, LAST))
            if name == LAST or rng.random() < 0.5
            if damage_something(root / name, other / name, one / step, rng)
        }
        good = [name for name in (LAST, BEFORE) if name not in damaged]
        if not good:
            with pytest.raises(ValueError, match=r"none that the training can go on from: .*init_from="):
                choose(root, said.append)
            assert sorted(path.name for path in root.iterdir()) == [BEFORE, LAST] and not said
            chosen.append(None)
        else:
            found = choose(root, said.append)
            assert found is not None and found.name == good[0], number
            assert contents(found) == written[found.name]
            chosen.append(found.name)
            for text in said:
                assert LAST in text and "goes on from step_00000002" in text
            assert bool(said) == (found.name == BEFORE) == (root / f"{LAST}.damaged").exists()
        shutil.rmtree(root)
    assert min(chosen.count(name) for name in (None, BEFORE, LAST)) > num_tries / 40


def test_a_damaged_optimizer_state_costs_two_steps_and_changes_nothing(configs, tmp_path: Path, caplog):
    """Zeros in the last checkpoint's moments: the training goes on from the one before, to the same bits."""
    config, _ = configs
    own = config.model_copy(update={"output_dir": tmp_path / "own"})
    shutil.copytree(config.output_dir, own.output_dir)
    path = own.output_dir / "checkpoints" / LAST / "resume" / "optimizer_00000_of_00001.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    summary = train(own)
    assert summary["resumed_at_step"] == 2
    assert "resume/optimizer_00000_of_00001.safetensors has sha256" in caplog.text and LAST in caplog.text
    again, before = (
        load_file(one.output_dir / f"checkpoints/{LAST}/ema.safetensors") for one in (own, config)
    )
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert (own.output_dir / "checkpoints" / f"{LAST}.damaged").is_dir()
    assert [path.name for path in complete_checkpoints(own.output_dir / "checkpoints")] == [BEFORE, LAST]


@pytest.mark.parametrize("what", ["resume", "complete.json"])
def test_checkpoints_that_lost_what_resuming_needs_are_no_fresh_start(configs, tmp_path: Path, what: str):
    config, _ = configs
    own = config.model_copy(update={"output_dir": tmp_path / "own"})
    shutil.copytree(config.output_dir, own.output_dir)
    for folder in complete_checkpoints(own.output_dir / "checkpoints"):
        shutil.rmtree(folder / what) if what == "resume" else (folder / what).unlink()
    before = contents(own.output_dir / "checkpoints")
    with pytest.raises(ValueError, match="there are checkpoints, and none that the training can go on from"):
        train(own)
    assert contents(own.output_dir / "checkpoints") == before


def test_what_is_damaged_is_set_aside_under_a_name_of_its_own(configs, tmp_path: Path):
    init_process_group()
    shutil.copytree(configs[0].output_dir / "checkpoints", tmp_path / "c")
    (tmp_path / "c" / f"{LAST}.damaged").mkdir()
    (tmp_path / "c" / LAST / "config.json").unlink()
    assert choose(tmp_path / "c", lambda text: None) == tmp_path / "c" / BEFORE
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        BEFORE,
        f"{LAST}.damaged",
        f"{LAST}.damaged-2",
    ]


def test_a_damaged_start_is_an_error(configs, tmp_path: Path):
    config, _ = configs
    start = tmp_path / "start" / LAST
    shutil.copytree(config.output_dir / "checkpoints" / LAST, start)
    flip_one_bit(start / "ema.safetensors", random.Random(0))
    with pytest.raises(ValueError, match=r"step_00000004: ema\.safetensors has sha256 .*copy it again"):
        train(config.model_copy(update={"output_dir": tmp_path / "out", "init_from": start}))


def test_the_latest_to_draw_from_is_the_latest_whole_one(configs, tmp_path: Path, caplog):
    root = tmp_path / "c"
    shutil.copytree(configs[0].output_dir / "checkpoints", root)
    (root / LAST / "resume" / "loop.json").unlink()  # drawing does not need it
    assert latest_whole(root) == root / LAST
    flip_one_bit(root / LAST / "ema.safetensors", random.Random(0))
    assert latest_whole(root) == root / BEFORE
    assert "ema.safetensors has sha256" in caplog.text and "step_00000002 is taken instead" in caplog.text
    (root / BEFORE / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint is whole.*ema\.safetensors.*has no complete\.json"):
        latest_whole(root)
    assert latest_whole(tmp_path / "none") is None


def test_a_second_training_in_the_same_folder_is_refused(configs, tmp_path: Path, monkeypatch):
    config = configs[0].model_copy(update={"output_dir": tmp_path / "out"})
    monkeypatch.setattr("repfusion.training.distributed.PATIENCE_SEC", 0.0)
    with locked(tmp_path / "out" / ".lock", ""), pytest.raises(ValueError, match="at work here: process"):
        train(config)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_ranks_share_the_reading():
    sizes = {"model": 8, "ema": 8, "optimizer_0": 5, "optimizer_1": 5, "loop": 0}
    files = {name: Seal(bytes=size, sha256="") for name, size in sizes.items()}
    for world_size in (1, 2, 3, 8):
        shares = [share_of(files, rank, world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(files)
        loads = [sum(sizes[name] for name in share) for share in shares]
        assert max(loads) == {1: 26, 2: 13, 3: 10, 8: 8}[world_size]
