"""Resuming under every ZeRO stage, bit for bit on as many ranks and within rounding on others; and what
becomes of a training whose rank is killed or stopped, or finds the disk full.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Job, Ranks, keys_read, rank_server
from safetensors.torch import load_file
from tiny_training import GRID, WIDTH, make_columns, make_foundation, npy, scan_and_replace, tiny_train

from repfusion.runs.folder import complete_checkpoints, latest_checkpoint
from repfusion.train import TrainConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("resume")
    return make_foundation(root / "weights"), make_columns(root / "data", num_samples=24)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with rank_server() as server:
        yield server


def job(config: TrainConfig, **changes) -> Job:
    return Job(config.model_dump_json(), log=str(config.output_dir / "log"), **changes)


def weights(config: TrainConfig, name: str = "model") -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(config.output_dir / "checkpoints")
    assert folder is not None
    return load_file(folder / f"{name}.safetensors")


def said(config: TrainConfig) -> str:
    return "\n".join(path.read_text() for path in sorted((config.output_dir / "log").glob("*.log")))


def assert_same(a: TrainConfig, b: TrainConfig) -> None:
    for name in ("model", "ema"):
        one, two = weights(a, name), weights(b, name)
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


SLOW = pytest.mark.slow
STAGES = [
    pytest.param({"zero_stage": 0}, id="0", marks=SLOW),
    pytest.param({"zero_stage": 1}, id="1", marks=SLOW),
    pytest.param({"zero_stage": 2}, id="2", marks=SLOW),
    pytest.param({"zero_stage": 3}, id="3", marks=SLOW),
    pytest.param({"zero_stage": 3, "frozen": "sharded"}, id="3-sharded", marks=SLOW),
    pytest.param({"zero_stage": 2, "offload_optimizer": True}, id="2-offloaded", marks=SLOW),
    pytest.param({"zero_stage": 3, "offload_optimizer": True}, id="3-offloaded", marks=SLOW),
]


@pytest.mark.parametrize("engine", STAGES)
def test_a_killed_rank_costs_nothing_but_the_time_since_the_checkpoint(world, ranks, tmp_path, engine):
    """Two ranks: six steps at once equal two, a SIGKILL in the fourth, and the rest after resuming."""
    engine = {**engine, "micro_batch_size": 2}
    whole = tiny_train(*world, tmp_path / "whole", engine, num_steps=6, keep_resume=9)
    assert ranks.run(job(whole, world_size=2)) == [0, 0], said(whole)
    parts = whole.model_copy(update={"output_dir": tmp_path / "parts"})
    codes = ranks.run(job(parts, world_size=2, kill_rank=1, kill_at_step=3))
    assert codes[1] == -9 and codes[0] != 0
    assert [folder.name for folder in complete_checkpoints(parts.output_dir / "checkpoints")] == [
        "step_00000002"
    ]
    assert ranks.run(job(parts, world_size=2)) == [0, 0], said(parts)
    assert json.loads((parts.output_dir / "train.json").read_text())["resumed_at_step"] == 2
    assert_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("engine", STAGES)
def test_the_world_may_change_from_two_ranks_to_one_to_four(world, ranks, tmp_path, engine):
    """The same weights within rounding as on one rank, and within an epoch (24 samples, 3 steps) no sample
    twice or missed.
    """
    engine = {**engine, "micro_batch_size": 2}
    alone = tiny_train(*world, tmp_path / "alone", engine, num_steps=6)
    assert ranks.run(job(alone)) == [0], said(alone)
    config = tiny_train(*world, tmp_path / "changing", engine, num_steps=6)
    for world_size, stop in ((2, 1), (1, 3), (4, None)):
        codes = ranks.run(job(config, world_size=world_size, stop_at_step=stop))
        assert codes == [0 if stop is None else 143] * world_size, said(config)
    for name in ("model", "ema"):
        one, two = weights(alone, name), weights(config, name)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=5e-4, msg=f"{name} {key}")
    read = keys_read(config.output_dir / "log")
    assert read == keys_read(alone.output_dir / "log")
    for epoch in range(2):
        counts = Counter(key for step, key in read if step // 3 == epoch)
        assert len(counts) == 24 and set(counts.values()) == {1}


@SLOW
def test_a_checkpoint_of_one_stage_resumes_under_another(world, ranks, tmp_path):
    config = tiny_train(*world, tmp_path / "a", {"micro_batch_size": 4, "zero_stage": 3}, num_steps=4)
    whole = tiny_train(*world, tmp_path / "b", {"micro_batch_size": 4, "zero_stage": 3}, num_steps=4)
    assert ranks.run(job(whole, world_size=2)) == [0, 0]
    assert ranks.run(job(config, world_size=2, stop_at_step=1)) == [143, 143]
    other = config.model_copy(update={"engine": config.engine.model_copy(update={"zero_stage": 1})})
    assert ranks.run(job(other, world_size=2)) == [0, 0], said(config)
    one, two = weights(whole), weights(other)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=5e-4)


MOMENTS = ["write_model", *(pytest.param(one, marks=SLOW) for one in ("begin_checkpoint", "write_json"))]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*MOMENTS, pytest.param("finish_checkpoint", marks=SLOW)])
def test_a_kill_during_a_save_leaves_a_whole_checkpoint_or_none(world, ranks, tmp_path, moment):
    engine = {"micro_batch_size": 4}
    whole = tiny_train(*world, tmp_path / "whole", engine, num_steps=6, keep_resume=9)
    assert ranks.run(job(whole, world_size=2)) == [0, 0]
    parts = whole.model_copy(update={"output_dir": tmp_path / "parts"})
    calls = 3 if moment == "write_json" else 2  # the second checkpoint's loop.json
    codes = ranks.run(job(parts, world_size=2, kill_in_save=moment, kill_at_call=calls))
    assert codes[0] == -9 and codes[1] != 0
    checkpoints = parts.output_dir / "checkpoints"
    assert [folder.name for folder in checkpoints.glob("step_*")] == ["step_00000002"]
    assert ranks.run(job(parts, world_size=2)) == [0, 0], said(parts)
    assert_same(whole, parts)
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_full_disk_ends_every_rank_and_keeps_the_last_good_checkpoint(world, ranks, tmp_path):
    config = tiny_train(*world, tmp_path / "full", {"micro_batch_size": 4}, num_steps=6)
    codes = ranks.run(job(config, world_size=2, file_limit=(2, 20_000)))
    assert codes == [1, 1]
    for rank in range(2):
        log = (config.output_dir / "log" / f"{rank}.log").read_text()
        assert "CheckpointError" in log and "the checkpoint of step 4 could not be written: rank 0" in log
        assert "the last good one is step_00000002" in log
    checkpoints = config.output_dir / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    assert ranks.run(job(config, world_size=2)) == [0, 0], said(config)
    whole = config.model_copy(update={"output_dir": tmp_path / "whole"})
    assert ranks.run(job(whole, world_size=2)) == [0, 0]
    assert_same(whole, config)


@pytest.mark.slow
def test_damage_that_one_rank_finds_is_known_to_all(world, ranks, tmp_path):
    """Each of two ranks compares some of the files: both go on from the checkpoint before, or both end."""
    config = tiny_train(*world, tmp_path / "out", {"micro_batch_size": 4, "zero_stage": 2}, num_steps=4)
    assert ranks.run(job(config, world_size=2)) == [0, 0], said(config)
    before, checkpoints = weights(config), config.output_dir / "checkpoints"
    for rank in range(2):
        path = checkpoints / "step_00000004" / "resume" / f"optimizer_0000{rank}_of_00002.safetensors"
        path.write_bytes(bytes(path.stat().st_size))
        assert ranks.run(job(config, world_size=2)) == [0, 0], said(config)
        log = said(config)
        assert f"resume/{path.name} has sha256" in log and "goes on from step_00000002" in log
        after = weights(config)
        assert all(torch.equal(after[name], before[name]) for name in before)
    for folder in complete_checkpoints(checkpoints):
        (folder / "ema.safetensors").unlink()
    assert ranks.run(job(config, world_size=2)) == [1, 1]
    for rank in range(2):
        log = (config.output_dir / "log" / f"{rank}.log").read_text()
        assert "none that the training can go on from: step_00000004: ema.safetensors is missing" in log


@pytest.mark.slow
def test_a_bad_sample_of_one_rank_stops_both_before_the_update(world, ranks, tmp_path):
    root = make_columns(tmp_path / "data", num_samples=8)
    bad = np.zeros((GRID**2, WIDTH), np.float16)
    bad[1, 2] = np.nan
    scan_and_replace(root / "image_features" / "00000.tar", "000003.image_features.npy", npy(bad))
    config = tiny_train(world[0], root, tmp_path / "out", {"micro_batch_size": 4})
    assert ranks.run(job(config, world_size=2)) == [1, 1]
    for rank in range(2):
        log = (config.output_dir / "log" / f"{rank}.log").read_text()
        assert "NonFiniteError: step 0: the loss is not finite" in log and "Samples: 000003." in log
    assert complete_checkpoints(config.output_dir / "checkpoints") == []
