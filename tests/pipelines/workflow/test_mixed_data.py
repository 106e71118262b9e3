"""Data sets mixed into a workflow's own: what makes the training stale, and what is missing."""

import shutil
from pathlib import Path

import pytest
from running import start_training

from pipelines.build import build_stages
from pipelines.shards.manifest import Manifest, ShardTable, write_output
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit
from pipelines.shards.tars import tar_shard
from pipelines.workflow.inspection import states


def write_stage(folder: Path, content: bytes) -> None:
    """A complete stage of one sample."""
    with ShardCommit(Folder.at(folder), "00000", "f", {}) as commit:
        with tar_shard(commit) as samples:
            samples.write("0", {"txt": content})
        table = ShardTable.of([commit.commit("00000.tar")])
    manifest = Manifest(
        stage=folder.name, fingerprint="f", fields={}, upstream={}, lineage={}, num_shards=1, samples=1,
        bytes=table.bytes, shards_digest=table.digest, drops={}, seconds=3.0, shard_seconds=2.0, files={},
        extra={},
    )  # fmt: skip
    write_output(Folder.at(folder), manifest, table)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for column in ("curate", "image_features"):
        write_stage(tmp_path / "photos" / column, b"one")
    return tmp_path / "photos"


@pytest.fixture
def train_stage(make_config):
    """The train stage of a workflow that mixes the given data sets in."""

    def build(weight: float = 1.0, **mix: dict):
        mix = {
            name: {
                "images": part.pop("root") / "curate",
                "columns": {"image_features": part.pop("features")},
                **part,
            }
            for name, part in mix.items()
        }
        return build_stages(
            make_config(last_stage="train", trainings={"train": {"data": {"mix": mix, "weight": weight}}})
        )[-1]

    return build


def mixed(root: Path, **changes) -> dict:
    return {"root": root, "features": root / "image_features", **changes}


def test_the_mix_decides_the_training(train_stage, photos: Path):
    alone = train_stage()
    start_training(train_stage(photos=mixed(photos)))

    def reason(stage) -> str:
        state = states([stage])["train"]
        return f"{state.status}: {state.reason}"

    assert "above are not complete" in reason(train_stage(photos=mixed(photos)))
    assert reason(alone) == "stale: data set 'photos' removed"
    assert reason(train_stage(photos=mixed(photos), art=mixed(photos))) == "stale: data set 'art' added"
    heavier = train_stage(photos=mixed(photos, weight=2.0))
    assert reason(heavier) == "stale: trainings.train.data.mix.photos.weight 1.0 -> 2.0"
    assert reason(train_stage(2.0, photos=mixed(photos))) == "stale: trainings.train.data.weight null -> 2.0"

    copy = photos.with_name("elsewhere")
    shutil.copytree(photos, copy)
    assert train_stage(photos=mixed(copy)).fingerprint == train_stage(photos=mixed(photos)).fingerprint
    write_stage(photos / "image_features", b"other")
    assert reason(train_stage(photos=mixed(photos))) == "stale: data set 'photos' changed"


def test_without_a_mix_the_weight_says_nothing(train_stage):
    assert train_stage(2.0).fingerprint == train_stage().fingerprint


@pytest.mark.parametrize("column", ["curate", "image_features"])
def test_a_data_set_that_is_not_complete_is_named(train_stage, photos: Path, column: str):
    (photos / column / "manifest.json").unlink()
    name = {"curate": "images", "image_features": "image_features"}[column]
    with pytest.raises(
        ValueError,
        match=rf"trainings\.train\.data\.mix\.photos\.{name}: {photos / column} holds no complete stage \(",
    ):
        train_stage(photos=mixed(photos))
