"""Shards of captions, as the stages `curate` and `captions` write them, and a stage that reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.dag import Place, ShardStage
from pipelines.shards.digests import Digests
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit
from pipelines.shards.tars import tar_shard
from pipelines.stages.caption_arrays import Reading

Captions = dict[str, dict[str, str]]

FIRST: Captions = {
    "000000000": {"txt": "a red circle", "long.txt": "a photo of a red circle"},
    "000000001": {"txt": "a blue square"},
    "000000002": {"txt": "a red circle\n", "long.txt": "there is a red circle"},
    "000000003": {"txt": "a photo of a red circle", "long.txt": "a photo of a red circle"},
    "000000004": {"txt": "two green diamonds below a purple cross", "long.txt": "a red circle"},
}
SECOND: Captions = {"000000005": {"txt": "a red circle", "long.txt": "an image of one circle"}}


def write_captions(root: Path, shards: dict[str, Captions]) -> None:
    """`curate` and `captions` under `root`."""
    for stage, wanted in (("curate", lambda name: name == "txt"), ("captions", lambda name: name != "txt")):
        for name, captions in shards.items():
            with ShardCommit(Folder.at(root / stage), name, "f", {}) as commit:
                with tar_shard(commit) as samples:
                    for key, own in captions.items():
                        samples.write(
                            key, {member: text.encode() for member, text in own.items() if wanted(member)}
                        )
                commit.commit(f"{name}.tar")


def fields_of(
    make: Any, config: Any, mllm: Path, root: Path, dtype: Any = "float32", names: Sequence[str] = ()
):
    """What decides the bytes of the column `c` that the stage of `make` would write."""
    place = Place(Folder.at(root), root, Digests(root))
    images = ShardStage("curate", {}, place.data / "curate", ())
    captions = ShardStage("captions", {}, place.data / "captions", ())
    return make("c", config, Reading(mllm, "model.mllm", dtype, images, captions, tuple(names)), place).fields
