"""Checkpoints on a real S3 server: whole or absent there, found and gone on from by a machine that has not
seen the training; kills, damage and retention as on local disk.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from ranks import Job, Ranks, rank_server
from safetensors.torch import load_file
from services import s3_server
from slowly import all_but_one_slow
from tiny_training import make_columns, make_foundation, tiny_train

from repfusion.config import ConfigError, validate
from repfusion.runs.folder import RunFolder, complete_checkpoints, is_pinned, latest_checkpoint
from repfusion.runs.remote import RemoteRun
from repfusion.train import TrainConfig, train
from repfusion.training.snapshot import CheckpointError

STEPS = ["step_00000002", "step_00000004", "step_00000006"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("remote")
    return make_foundation(root / "weights"), make_columns(root / "data", num_samples=24)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 server with a bucket, `runs`, to which the environment leads."""
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3") / "log") as address:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", address)
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("runs")
        yield files


@pytest.fixture(scope="module")
def trained(world, store, tmp_path_factory) -> TrainConfig:
    """Six steps with a checkpoint each two, all kept. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_train(*world, folder / "run", num_steps=6, output_url="s3://runs/trained")
    train(config)
    return config


def copied(store, config: TrainConfig, name: str, folder: Path) -> TrainConfig:
    """A training of its own behind a URL, which this machine has not seen."""
    store.copy("runs/trained", f"runs/{name}", recursive=True)
    return config.model_copy(update={"output_dir": folder / "elsewhere", "output_url": f"s3://runs/{name}"})


def without(store, config: TrainConfig, step: int) -> None:
    assert config.output_url is not None
    store.rm(f"{config.output_url}/checkpoints/step_{step:08d}", recursive=True)


def local_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(a: TrainConfig, b: TrainConfig) -> None:
    for name in ("model", "ema"):
        one, two = (
            load_file(latest_checkpoint(RunFolder(run.output_dir).checkpoints) / f"{name}.safetensors")
            for run in (a, b)
        )
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_every_checkpoint_is_there_byte_for_byte(trained, store, tmp_path):
    store.get("runs/trained/checkpoints", str(tmp_path / "there"), recursive=True)
    assert local_files(tmp_path / "there") == local_files(trained.output_dir / "checkpoints")
    assert RemoteRun(trained.output_url).steps() == [2, 4, 6]
    assert RemoteRun(trained.output_url).steps(resumable=True) == [4, 6]  # keep_resume is 2
    assert {"config.json", "train.json"} <= {path.rpartition("/")[2] for path in store.ls("runs/trained")}


def test_a_machine_that_never_saw_the_run_goes_on_from_the_newest(trained, store, tmp_path):
    config = copied(store, trained, "unseen", tmp_path)
    without(store, config, 6)
    store.rm("runs/unseen/train.json")
    assert train(config)["resumed_at_step"] == 4
    assert_same_weights(config, trained)
    assert RemoteRun(config.output_url).steps() == [2, 4, 6]


@pytest.mark.slow
def test_a_complete_training_is_fetched_and_not_repeated(trained, store, tmp_path):
    config = copied(store, trained, "complete", tmp_path)
    assert train(config) == json.loads((trained.output_dir / "train.json").read_text())
    assert [path.name for path in complete_checkpoints(config.output_dir / "checkpoints")] == STEPS[2:]


def test_what_is_here_already_is_not_fetched_again(trained, store, tmp_path, monkeypatch):
    config = copied(store, trained, "here", tmp_path)
    shutil.copytree(trained.output_dir, config.output_dir)
    monkeypatch.setattr(RemoteRun, "fetch", lambda *args: pytest.fail("fetched"))
    train(config)


def test_a_damaged_local_checkpoint_is_fetched_anew(trained, store, tmp_path):
    config = copied(store, trained, "mended", tmp_path)
    shutil.copytree(trained.output_dir, config.output_dir)
    path = config.output_dir / "checkpoints" / STEPS[2] / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(config)
    assert_same_weights(config, trained)
    assert not list((config.output_dir / "checkpoints").glob("*.damaged"))


def corrupt(store, path: str) -> None:
    data = bytearray(store.cat_file(path))
    data[len(data) // 2] ^= 1
    store.pipe_file(path, bytes(data))


@pytest.mark.parametrize(
    "file", all_but_one_slow(["model.safetensors", "resume/loop.json", "complete.json"], "complete.json")
)
def test_a_damaged_one_is_set_aside_and_the_one_before_taken(trained, store, tmp_path, file):
    name = f"damaged-{file[0]}"
    config, said = copied(store, trained, name, tmp_path), []
    store.rm(f"runs/{name}/train.json")
    corrupt(store, f"runs/{name}/checkpoints/{STEPS[2]}/{file}")
    assert train(config, warn=said.append)["resumed_at_step"] == 4
    assert len(said) == 1 and f"s3://runs/{name}: step 6: " in said[0]
    assert file in said[0] and f"kept as {STEPS[2]}.damaged" in said[0]
    assert store.isfile(f"runs/{name}/checkpoints/{STEPS[2]}.damaged/{file}")
    assert RemoteRun(config.output_url).steps() == [2, 4, 6]
    assert_same_weights(config, trained)


@pytest.mark.slow
def test_a_file_that_was_deleted_is_damage_too(trained, store, tmp_path):
    config, said = copied(store, trained, "deleted", tmp_path), []
    store.rm(f"runs/deleted/checkpoints/{STEPS[2]}/ema.safetensors")
    train(config, warn=said.append)
    assert "ema.safetensors" in said[0] and "missing" in said[0]


def test_where_all_are_damaged_nothing_starts_anew(trained, store, tmp_path):
    config = copied(store, trained, "all", tmp_path)
    for step in STEPS:
        corrupt(store, f"runs/all/checkpoints/{step}/model.safetensors")
    with pytest.raises(ValueError, match=r"s3://runs/all: there are checkpoints, and none that .* step 4: "):
        train(config, warn=lambda text: None)


def test_retention_is_the_same(world, store, tmp_path):
    config = tiny_train(
        *world,
        tmp_path / "run",
        num_steps=6,
        checkpoint_every_steps=1,
        keep_resume=1,
        keep_last=2,
        keep_every_steps=3,
        output_url="s3://runs/kept",
    )
    pin = config.output_dir / "checkpoints" / "step_00000002" / "pins" / "best"

    def on_checkpoint(folder: Path, step: int, seconds: float) -> None:
        if step == 2:
            pin.parent.mkdir()
            pin.touch()

    train(config, on_checkpoint)
    assert is_pinned(pin.parent.parent)
    remote, local = RemoteRun("s3://runs/kept"), complete_checkpoints(config.output_dir / "checkpoints")
    assert remote.steps() == [2, 3, 5, 6] and [int(path.name[5:]) for path in local] == remote.steps()
    assert remote.steps(resumable=True) == [6]


@pytest.fixture(scope="module")
def ranks(store) -> Iterator[Ranks]:
    with rank_server() as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(("at_file", "there"), [(1, []), (6, []), (9, [2])])
def test_a_kill_in_the_middle_of_an_upload_leaves_the_one_before(
    world, ranks, store, tmp_path, at_file, there
):
    """Two ranks, the first of which uploads five files a checkpoint and then `complete.json`; killed in the
    first or second upload; goes on here, where the local checkpoint is whole, and elsewhere.
    """
    name = f"killed-{at_file}"
    config = tiny_train(
        *world, tmp_path / "run", {"micro_batch_size": 4}, num_steps=6, output_url=f"s3://runs/{name}"
    )
    remote = RemoteRun(f"s3://runs/{name}")

    def run(config: TrainConfig, **changes) -> list[int]:
        log = str(config.output_dir / "log")
        return ranks.run(Job(config.model_dump_json(), world_size=2, log=log, **changes))

    assert run(config, kill_in_upload=at_file)[0] == -9
    assert remote.steps() == there
    elsewhere = config.model_copy(
        update={"output_dir": tmp_path / "elsewhere", "output_url": f"s3://runs/{name}-2"}
    )
    if there:
        store.copy(f"runs/{name}", f"runs/{name}-2", recursive=True)
    for one in (config, elsewhere):
        assert run(one) == [0, 0], (one.output_dir / "log" / "0.log").read_text()
        assert RemoteRun(one.output_url).steps() == [2, 4, 6]
    notes = [json.loads((one.output_dir / "train.json").read_text()) for one in (config, elsewhere)]
    assert [note["resumed_at_step"] for note in notes] == ([4, 2] if there else [2, 0])
    assert_same_weights(config, elsewhere)


NOT_THERE = "see that the bucket exists, that the credentials in the environment may read and write it"


def refusal(config: TrainConfig) -> str:
    """Why a training ends before it wrote any checkpoint."""
    with pytest.raises((ValueError, CheckpointError)) as caught:
        train(config)
    assert complete_checkpoints(config.output_dir / "checkpoints") == []
    return str(caught.value)


def test_a_bucket_that_is_missing_is_said_before_anything_is_trained(world, store, tmp_path):
    said = refusal(tiny_train(*world, tmp_path / "run", output_url="s3://nowhere/run"))
    assert "s3://nowhere/run: " in said and NOT_THERE in said


def test_a_bucket_that_may_not_be_written_is_said_before_anything_is_trained(
    world, store, tmp_path, monkeypatch
):
    from s3fs import S3FileSystem

    async def refused(*args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(S3FileSystem, "_pipe_file", refused)
    fsspec.filesystem("s3").clear_instance_cache()
    said = refusal(tiny_train(*world, tmp_path / "run", output_url="s3://runs/refused"))
    assert "s3://runs/refused: PermissionError: Access Denied" in said and NOT_THERE in said


def test_a_store_that_does_not_answer_is_named(world, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    said = refusal(tiny_train(*world, tmp_path / "run", output_url="s3://runs/away"))
    assert said.startswith("the checkpoints could not be read: rank 0: OSError: s3://runs/away: ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("output_dir", "s3://bucket/run", "is a URL; expected a local folder, and the URL as output_url"),
        ("output_url", "runs/here", "'runs/here' is no URL such as s3://bucket/run"),
    ],
)
def test_a_place_in_the_wrong_field_is_refused(world, tmp_path, field, value, message):
    values = tiny_train(*world, tmp_path / "run").model_dump(mode="json")
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig, {**values, field: value})
