"""Editing samples of tars, folders and parquet files: whole triples, or counted drops."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_tars import write_tar
from PIL import Image

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.tars import read_samples
from pipelines.sources import folder, parquet, tars
from pipelines.sources.ingest import IngestConfig
from repfusion.data.source_images import source_members

INGEST = IngestConfig(image_size=16, max_drop_fraction=1)


def picture(red: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (red, 7, 9)).save(stream, kind)
    return stream.getvalue()


def triple(index: int, **changes: bytes | None) -> dict[str, bytes | None]:
    """Target, instruction and two sources, of which any may be changed or missing."""
    own = {"png": picture(index), "txt": f"edit {index}".encode()}
    return own | {"before": picture(99 + index), "style": picture(180 + index, "JPEG")} | changes


TRIPLES = {
    "a0": triple(0),
    "a1": triple(1, before=None),
    "a2": triple(2, style=b"no image"),
    "a3": triple(3, png=b"no image"),
    "a4": triple(4, style=None, before=None),
    "a5": triple(5),
}
DROPS = {1: "missing_source", 2: "broken_source", 3: "undecodable_image", 4: "missing_source"}
FILES = {"png": "png", "txt": "txt", "before": "before.png", "style": "style.jpg"}
"""What the file of each part is called behind the key."""


def files() -> dict[str, bytes]:
    return {
        f"{key}.{FILES[part]}": data
        for key, parts in TRIPLES.items()
        for part, data in parts.items()
        if data is not None
    }


def tar_config(root: Path, images: tuple[str, ...]) -> tars.TarsConfig:
    return tars.TarsConfig(path=str(write_tar(root / "in.tar", files())), images=images)


def folder_config(root: Path, images: tuple[str, ...]) -> folder.FolderConfig:
    for name, data in files().items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(data)
    return folder.FolderConfig(path=str(root / "in"), images=images)


def listed_config(root: Path, images: tuple[str, ...]) -> folder.FolderConfig:
    """The same, with captions in a list and none beside the images."""
    config = folder_config(root, images)
    for path in (root / "in").glob("*.txt"):
        path.unlink()
    lines = [{"file_name": f"{key}.png", "text": f"edit {key[1:]}"} for key in TRIPLES]
    (root / "in" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def parquet_config(root: Path, images: tuple[str, ...]) -> parquet.ParquetConfig:
    rows = [
        {
            "image": {"bytes": one["png"]},
            "caption": one["txt"].decode(),
            "before": {"bytes": one["before"], "path": "b.png"},
            "style": one["style"],
        }
        for one in TRIPLES.values()
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "in.parquet")
    return parquet.ParquetConfig(path=str(root / "in.parquet"), images=images)


KINDS: dict[str, tuple[Callable[..., Any], Any, type]] = {
    "tars": (tar_config, tars, tars.TarWorker),
    "folder": (folder_config, folder, folder.FolderWorker),
    "list": (listed_config, folder, folder.FolderWorker),
    "parquet": (parquet_config, parquet, parquet.ParquetWorker),
}


def ingest(to: Path, config: Any, module: Any, worker: type) -> tuple[dict[str, dict[str, bytes]], list[Any]]:
    """Samples by key, and rows of drops."""
    make = worker(Folder.at(to), config, INGEST)
    (sidecar,) = [make(job) for job in module.jobs(config)]
    rows = pq.read_table(to / f"{sidecar.name}.drops.parquet").to_pylist() if sidecar.drops else []
    assert sidecar.samples + len(rows) >= len(TRIPLES)
    return dict(read_samples(Folder.at(to), sidecar.file, sidecar)), rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_triple_is_whole_or_a_counted_drop(kind, tmp_path):
    build, module, worker = KINDS[kind]
    found, drops = ingest(tmp_path / "out", build(tmp_path, ("before", "style")), module, worker)
    assert [int(row["key"]) for row in drops] == list(DROPS)
    assert [row["reason"] for row in drops] == list(DROPS.values())
    assert "source image 1" in drops[0]["detail"] and "source image 2: " in drops[1]["detail"]
    assert [members["txt"] for members in found.values()] == [b"edit 0", b"edit 5"]
    for members, index in zip(found.values(), (0, 5), strict=True):
        assert members.keys() == {"png", "txt", "json", "source.png", "source2.png"}
        for extension, red in {"png": index, "source.png": 99 + index, "source2.png": 180 + index}.items():
            with Image.open(io.BytesIO(members[extension])) as image:
                assert image.size == (16, 16) and abs(image.getpixel((8, 8))[0] - red) <= 2, extension
        assert json.loads(members["json"])["original_width"] == 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_sources_is_that_of_the_configuration(kind, tmp_path):
    build, module, worker = KINDS[kind]
    one, _ = ingest(tmp_path / "one", build(tmp_path, ("before", "style")), module, worker)
    two, _ = ingest(tmp_path / "two", build(tmp_path, ("style", "before")), module, worker)
    for first, second in zip(one.values(), two.values(), strict=True):
        assert (first["source.png"], first["source2.png"]) == (second["source2.png"], second["source.png"])


@pytest.mark.slow
def test_the_same_bytes_again_also_from_a_process_of_its_own(tmp_path):
    build, module, worker = KINDS["tars"]
    config = build(tmp_path, ("before", "style"))
    one, _ = ingest(tmp_path / "one", config, module, worker)
    (job,) = module.jobs(config)
    careful = ShardJob(job.name, job.fingerprint, job.inputs, job.arguments, careful_sec=60)
    sidecar = worker(Folder.at(tmp_path / "two"), config, INGEST)(careful)
    assert dict(read_samples(Folder.at(tmp_path / "two"), sidecar.file, sidecar)) == one


@pytest.mark.parametrize("kind", KINDS)
def test_where_sources_come_from_is_in_the_fingerprint_and_nothing_where_there_are_none(kind, tmp_path):
    build, module, _ = KINDS[kind]
    fields = [
        module.fingerprint_fields(build(tmp_path, images), INGEST)
        for images in [(), ("before",), ("style", "before")]
    ]
    assert "source.images" not in fields[0]
    assert [one["source.images"] for one in fields[1:]] == [["before"], ["style", "before"]]
    assert {**fields[1], "source.images": 0} == {**fields[0], "source.images": 0}


def test_without_sources_asked_for_a_tar_counts_the_members_that_it_leaves(tmp_path):
    found, drops = ingest(tmp_path / "out", *(KINDS["tars"][0](tmp_path, ()), *KINDS["tars"][1:]))
    assert all(members.keys() == {"png", "txt", "json"} for members in found.values())
    counted = [row["detail"] for row in drops if row["reason"] == "extra_image"]
    assert {"a0.before.png", "a0.style.jpg", "a2.style.jpg"} <= set(counted) and len(counted) == 7


def test_other_members_beside_sources_are_still_counted(tmp_path):
    members = {"a.png": picture(1), "a.txt": b"x", "a.before.png": picture(2), "a.mask.png": picture(3)}
    config = tars.TarsConfig(path=str(write_tar(tmp_path / "in.tar", members)), images=("before",))
    make = tars.TarWorker(Folder.at(tmp_path / "out"), config, INGEST)
    sidecar = make(tars.jobs(config)[0])
    assert (sidecar.samples, sidecar.drops) == (1, {"extra_image": 1})


def test_two_members_that_may_be_the_source_are_named(tmp_path):
    members = {"a.png": picture(1), "a.txt": b"x", "a.before.png": picture(2), "a.before.jpg": picture(3)}
    config = tars.TarsConfig(path=str(write_tar(tmp_path / "in.tar", members)), images=("before",))
    make = tars.TarWorker(Folder.at(tmp_path / "out"), config, INGEST)
    assert make(tars.jobs(config)[0]).drops == {"several_images": 1}
    for name, data in members.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    listed = folder.FolderConfig(path=str(tmp_path / "in"), images=("before",))
    make = folder.FolderWorker(Folder.at(tmp_path / "folder"), listed, INGEST)
    assert make(folder.jobs(listed)[0]).drops == {"broken_source": 1}


def test_a_source_picture_that_changed_is_read_again_and_one_without_a_target_is_counted(tmp_path):
    config = folder_config(tmp_path, ("before",))
    before = folder.jobs(config)[0].inputs["files"]
    (tmp_path / "in" / "a0.before.png").write_bytes(picture(77) + b"\0")
    assert folder.jobs(config)[0].inputs["files"] != before
    (tmp_path / "in" / "lonely.before.png").write_bytes(picture(5))
    make = folder.FolderWorker(Folder.at(tmp_path / "out"), config, INGEST)
    # the second source is asked for no more, so that each of its pictures is an image without a caption
    expected = {"missing_source": 2, "no_caption": 6, "undecodable_image": 1}
    assert make(folder.jobs(config)[0]).drops == expected


def test_keys_that_end_at_the_last_dot_have_no_sources_of_their_own():
    with pytest.raises(ValueError, match=r"key_ends last_dot.* is of another key than KEY\.png"):
        tars.TarsConfig(path="x.tar", images=("source",), key_ends="last_dot")


@pytest.mark.parametrize("names", [("a", "a"), ("",)])
def test_sources_are_named_apart(names):
    with pytest.raises(ValueError, match="expected names that differ"):
        parquet.ParquetConfig(path="x.parquet", images=names)


def test_a_column_of_sources_has_to_hold_images(tmp_path):
    config = parquet_config(tmp_path, ("caption",))
    with pytest.raises(ValueError, match=r"column 'caption' \(source.images\) is string; expected binary"):
        parquet.jobs(config)


def test_source_members_come_in_the_order_of_their_numbers():
    extensions = ["txt", *(f"source{n}.png" for n in range(12, 1, -1)), "png", "source.jpg", "source.json"]
    assert source_members(extensions) == ["source.jpg", *(f"source{n}.png" for n in range(2, 13))]
    with pytest.raises(ValueError, match=r"no source image 1 beside source2\.png"):
        source_members(["png", "source2.png"])
    with pytest.raises(ValueError, match="two source images 1"):
        source_members(["source.png", "source.jpg"])
