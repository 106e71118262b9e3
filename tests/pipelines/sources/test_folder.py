"""Image files -> samples: each image and each caption kept or counted, wherever the captions lie."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources import folder as folder_source
from pipelines.sources.folder import FolderConfig, FolderEntries, FolderWorker, jobs
from pipelines.sources.ingest import IngestConfig

AS_IS = IngestConfig(image_size=None, max_drop_fraction=1)


def picture(index: int = 0, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (index, 7, 9)).save(stream, kind)
    return stream.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def run(
    config: FolderConfig, to: Path, size: int = 4, ingest: IngestConfig = AS_IS, reverse: bool = False
) -> list[Sidecar]:
    worker = FolderWorker(Folder.at(to), config, ingest)
    listed = jobs(config.model_copy(update={"shard_size": size}))
    return sorted(
        (worker(job) for job in (reversed(listed) if reverse else listed)), key=lambda one: one.name
    )


def read(folder: Path, sidecars: list[Sidecar]) -> dict[str, tuple[str, str]]:
    """Key -> source file and caption."""
    return {
        key: (json.loads(members["json"])["source_file"], members["txt"].decode())
        for sidecar in sidecars
        for key, members in read_samples(Folder.at(folder), sidecar.file, sidecar)
    }


def drops(folder: Path, sidecars: list[Sidecar]) -> dict[str, tuple[str, str]]:
    found = {}
    for sidecar in sidecars:
        if sidecar.drops:
            for row in pq.read_table(folder / f"{sidecar.name}.drops.parquet").to_pylist():
                found[row["key"]] = (row["reason"], row["detail"])
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    files = {
        f"{name}.png": picture(index)
        for index, name in enumerate(["b/1", "b/2", "b.x/1", "a", "z/y/x", "b/10"])
    }
    captions = {name.replace(".png", ".txt"): f"shows {name}".encode() for name in files}
    return write(tmp_path / "in", files | captions | {"notes.md": b"x", ".hidden/1.png": b"x"})


def test_captions_beside_the_images(tmp_path, data):
    sidecars = run(FolderConfig(path=str(data)), tmp_path / "out")
    assert [one.samples for one in sidecars] == [4, 2]
    names = ["a.png", "b/1.png", "b/10.png", "b/2.png", "b.x/1.png", "z/y/x.png"]
    assert read(tmp_path / "out", sidecars) == {
        f"{i:09d}": (name, f"shows {name}") for i, name in enumerate(names)
    }
    members = dict(read_samples(Folder.at(tmp_path / "out"), "00000.tar"))["000000001"]
    assert members["png"] == picture(0)
    assert json.loads(members["json"]) == {
        "key": "000000001", "source_file": "b/1.png",
        "width": 20, "height": 30, "original_width": 20, "original_height": 30,
    }  # fmt: skip


def test_the_same_bytes_in_any_order_and_only_changed_shards_again(tmp_path, data):
    config = FolderConfig(path=str(data), shard_size=2)
    first = run(config, tmp_path / "a", 2)
    assert [one.sha256 for one in run(config, tmp_path / "b", 2, reverse=True)] == [
        one.sha256 for one in first
    ]
    before = [job.inputs for job in jobs(config)]
    os.utime(data / "b/2.txt", ns=(1, 1))
    after = [job.inputs for job in jobs(config)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert all(inputs.keys() == {"files"} for inputs in after)


def test_every_file_that_is_no_sample_is_counted(tmp_path):
    files = {
        "0.png": picture(), "0.txt": b"fine",
        "1.png": picture(),
        "2.txt": b"no image",
        "3.jpg": b"junk", "3.txt": b"x",
        "4.webp": picture(kind="WEBP"), "4.txt": b"caf\xe9",
        "5.PNG": picture(), "5.txt": b"fine too",
        "6.png": picture(), "6.jpg": picture(1, "JPEG"), "6.txt": b"of both",
    }  # fmt: skip
    config = FolderConfig(path=str(write(tmp_path / "in", files)))
    sidecars = run(config, tmp_path / "out", 100)
    assert sidecars[0].samples == 4
    assert sidecars[0].drops == {
        "no_caption": 1,
        "no_image": 1,
        "undecodable_caption": 1,
        "undecodable_image": 1,
    }
    assert [name for name, _ in read(tmp_path / "out", sidecars).values()] == [
        "0.png",
        "5.PNG",
        "6.jpg",
        "6.png",
    ]
    assert drops(tmp_path / "out", sidecars)["000000002"] == ("no_image", "2.txt: a caption without an image")


@pytest.mark.parametrize("with_csv", [False, True])
def test_what_is_no_regular_file_of_the_folder_is_counted(tmp_path, with_csv):
    root = write(tmp_path / "in", {f"{name}.png": picture() for name in ("a", "big", "sub/b")})
    write(root, {f"{name}.txt": b"x" for name in ("a", "big", "fifo", "gone", "in", "out", "sub/b")})
    write(root, {"pipe_text.png": picture()})
    outside = write(tmp_path / "out", {"o.png": picture(), "o.txt": b"x"})
    os.mkfifo(root / "fifo.png")
    os.mkfifo(root / "pipe_text.txt")
    for name, target in {
        "gone.png": root / "nowhere.png", "in.png": "sub/b.png", "out.png": outside / "o.png",
        "loop": root, "itself.png": root / "itself.png", "away": outside, "folder.png": root / "sub",
        "not_mounted": root / "nowhere",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    with (root / "big.png").open("ab") as stream:
        stream.truncate(8 << 30)
    config = FolderConfig(path=str(root))
    if with_csv:
        names = [path.relative_to(root) for path in root.rglob("*.png")]
        (root / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{name},x\n" for name in names))
        config = config.model_copy(update={"captions": str(root / "metadata.csv")})
    sidecars = run(config, tmp_path / "made")
    expected = {"broken_link": 3, "link_out": 2, "link_to_folder": 2, "not_a_file": 1, "too_many_bytes": 1}
    found = Counter({name: sum(one.drops.get(name, 0) for one in sidecars) for name in expected})
    kept = sorted(name for name, _ in read(tmp_path / "made", sidecars).values())
    if with_csv:
        assert kept == ["a.png", "in.png", "pipe_text.png", "sub/b.png"]
        assert found == expected
    else:
        assert kept == ["a.png", "in.png", "sub/b.png"]
        assert found == {**expected, "not_a_file": 2}


def test_captions_in_a_csv(tmp_path, data):
    lines = [
        'file_name,caption,long',
        'z/y/x.png,"last, with a comma",',
        './b/1.png,one,"two\nlines"',
        'b/3.png,nowhere,x',
        'a.png,first,y',
        'b/1.png,again,x',
        'b/2.png,,x',
        'b.x/1.png,x,x',
    ]  # fmt: skip
    (data / "metadata.csv").write_text("\n".join(lines) + "\n")
    config = FolderConfig(path=str(data), captions=str(data / "metadata.csv"), extra_columns=("long",))
    sidecars = run(config, tmp_path / "out", 3)
    assert read(tmp_path / "out", sidecars) == {
        "000000000": ("a.png", "first"),
        "000000001": ("b/1.png", "one"),
        "000000004": ("b/2.png", ""),
        "000000006": ("b.x/1.png", "x"),
        "000000007": ("z/y/x.png", "last, with a comma"),
    }
    assert drops(tmp_path / "out", sidecars) == {
        "000000002": ("repeated_row", "b/1.png: the list names it before"),
        "000000003": ("not_in_list", "b/10.png: on disk, not in the list"),
        "000000005": ("not_on_disk", "b/3.png: named in the list, not on disk"),
    }
    assert sum(one.samples + sum(one.drops.values()) for one in sidecars) == 8
    members = dict(read_samples(Folder.at(tmp_path / "out"), "00000.tar"))["000000001"]
    assert json.loads(members["json"])["long"] == "two\nlines"
    assert [one.sha256 for one in run(config, tmp_path / "b", 3, reverse=True)] == [
        one.sha256 for one in sidecars
    ]


def test_a_changed_line_of_the_csv_redoes_its_own_shard(data):
    table = data / "metadata.csv"
    table.write_text(
        "file_name,caption\na.png,x\nb/1.png,x\nb/2.png,x\nb/10.png,x\nb.x/1.png,x\nz/y/x.png,x\n"
    )
    config = FolderConfig(path=str(data), captions=str(table), shard_size=2)
    before = [job.inputs for job in jobs(config)]
    table.write_text(table.read_text().replace("z/y/x.png,x", "z/y/x.png,changed"))
    assert [old == job.inputs for old, job in zip(before, jobs(config), strict=True)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("with_csv", [False, True])
def test_a_walk_from_any_entry_gives_the_rest(tmp_path, data, with_csv):
    names = [str(path.relative_to(data)) for path in data.rglob("*.png") if ".hidden" not in path.parts]
    (data / "c.csv").write_text(
        "file_name,caption\n" + "".join(f"{name},x\n" for name in [*names, "b/zz.png", "a/a"])
    )
    config = FolderConfig(path=str(data), captions=str(data / "c.csv") if with_csv else None)
    entries = FolderEntries(config)
    whole = list(entries.walk())
    assert len(whole) == (8 if with_csv else 6)
    for index, entry in enumerate(whole):
        assert list(entries.walk(entry.path)) == whole[index:]


def test_files_that_changed_since_they_were_listed(tmp_path, data):
    config = FolderConfig(path=str(data), shard_size=4)
    listed = jobs(config)
    (data / "b/11.png").write_bytes(picture())
    worker = FolderWorker(Folder.at(tmp_path / "out"), config, AS_IS)
    with pytest.raises(ShardError, match=r"shard 00000: the files in .* from a\.png on changed.*run again"):
        worker(listed[0])


def test_a_probe_reads_every_so_manieth_entry(tmp_path, data):
    config = FolderConfig(path=str(data))
    assert folder_source.num_entries(config) == 6
    (job,) = folder_source.probe_jobs(config, 3, 1)
    sidecar = FolderWorker(Folder.at(tmp_path / "out"), config, AS_IS)(job)
    assert [name for name, _ in read(tmp_path / "out", [sidecar]).values()] == [
        "b/1.png",
        "b/2.png",
        "z/y/x.png",
    ]


def test_names_that_are_no_text_are_dropped(tmp_path):
    root = write(tmp_path / "in", {"a.png": picture(), "a.txt": b"x"})
    for ending, data in ((b".png", picture()), (b".txt", b"x")):
        with open(os.fsencode(root) + b"/\xff" + ending, "wb") as stream:
            stream.write(data)
    (sidecar,) = run(FolderConfig(path=str(root)), tmp_path / "out")
    assert sidecar.samples == 1 and sidecar.drops == {"undecodable_metadata": 1}


def test_a_folder_at_a_url(tmp_path, data):
    import fsspec

    files = fsspec.filesystem("memory")
    for path in data.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/images/{path.relative_to(data)}", path.read_bytes())
    local, remote = tmp_path / "local", tmp_path / "remote"
    expected = run(FolderConfig(path=str(data)), local)
    found = run(FolderConfig(path="memory://images"), remote)
    assert [one.sha256 for one in found] == [one.sha256 for one in expected]
    files.rm("/images", recursive=True)


def test_a_folder_in_a_bucket(tmp_path, data, s3_folder):
    for path in data.rglob("*"):
        if path.is_file():
            place = s3_folder / str(path.parent.relative_to(data)) if path.parent != data else s3_folder
            place.write(path.name, path.read_bytes())
    expected = run(FolderConfig(path=str(data)), tmp_path / "local")
    config = FolderConfig(path=s3_folder.url, options=dict(s3_folder.options), shard_size=4)
    assert [one.sha256 for one in run(config, tmp_path / "remote")] == [one.sha256 for one in expected]
    before = [job.inputs for job in jobs(config)]
    s3_folder.write("a.png", picture(99))
    assert [old == job.inputs for old, job in zip(before, jobs(config), strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere"}, "source.path: nowhere: .*expected a folder of images"),
        ({"captions": "nowhere.csv"}, r"source\.captions: nowhere\.csv: no such file"),
        (
            {"captions": "c.csv", "caption_column": "text"},
            r"c\.csv has no column 'text' \(source\.caption_column\); it has \['file_name'",
        ),
        ({"extra_columns": ("width",)}, r"\['width'\] are names"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, data, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=message):
        jobs(FolderConfig(**{"shard_size": 3, "path": str(data), **fields}))


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"source\.path: .* holds no images \(\.jpg"):
        jobs(FolderConfig(path=str(tmp_path), shard_size=3))


def test_what_decides_the_bytes():
    base = folder_source.fingerprint_fields(FolderConfig(path="a"), IngestConfig())
    assert base == folder_source.fingerprint_fields(FolderConfig(path="b", options={"x": 1}), IngestConfig())
    assert base != folder_source.fingerprint_fields(FolderConfig(path="a", captions="c.csv"), IngestConfig())


CIRCLE = "a red circle"
LEFT = {
    "bom": (".txt", CIRCLE.encode("utf-8-sig")),
    "plain": (".txt", CIRCLE.encode()),
    "utf16": (".txt", CIRCLE.encode("utf-16")),
    "kohya": (".caption", CIRCLE.encode()),
    "upper": (".TXT", CIRCLE.encode()),
    "double": (".png.txt", CIRCLE.encode()),
    "lines": (".txt", b"a red circle\na blue square\n\na photo of a circle\n"),
    "nul": (".txt", b"a red\0 circle"),
    "latin": (".txt", b"caf\xe9"),
}
"""Caption files as other tools leave them: their ending and what is in them."""


@pytest.mark.parametrize("several", ["whole", "first", "all"])
def test_captions_as_other_tools_leave_them(tmp_path, several):
    files = {f"{name}.png": picture(index) for index, name in enumerate(LEFT)}
    files |= {name + ending: data for name, (ending, data) in LEFT.items()}
    config = FolderConfig(path=str(write(tmp_path / "in", files)), several_captions=several)
    (sidecar,) = run(config, tmp_path / "out", 100)
    lines = LEFT["lines"][1].decode() if several == "whole" else CIRCLE
    assert sorted(read(tmp_path / "out", [sidecar]).values()) == [
        ("bom.png", CIRCLE), ("double.png", CIRCLE), ("kohya.png", CIRCLE), ("lines.png", lines),
        ("plain.png", CIRCLE), ("upper.png", CIRCLE), ("utf16.png", CIRCLE),
    ]  # fmt: skip
    assert sidecar.drops == {"undecodable_caption": 2}
    assert any(
        "nul.png: a NUL at character 5" in detail for _, detail in drops(tmp_path / "out", [sidecar]).values()
    )
    for _, members in read_samples(Folder.at(tmp_path / "out"), "00000.tar"):
        record = json.loads(members["json"])
        several_lines = record["source_file"] == "lines.png"
        every = [CIRCLE, "a blue square", "a photo of a circle"] if several_lines else [CIRCLE]
        assert record.get("all_captions") == (every if several == "all" else None)


def test_a_caption_under_several_names_is_the_nearest(tmp_path):
    files = {
        "a.png": picture(0), "a.jpg": picture(1, "JPEG"),
        "a.png.txt": b"of the png", "a.txt": b"of both", "a.caption": b"unused", "a.TXT": b"unused",
        "b.png": picture(2), "b.caption": b"second", "b.Txt": b"first",
        "c.png.TXT": b"no image", "d.caption": b"no image",
    }  # fmt: skip
    (sidecar,) = run(FolderConfig(path=str(write(tmp_path / "in", files))), tmp_path / "out", 100)
    assert list(read(tmp_path / "out", [sidecar]).values()) == [
        ("a.jpg", "of both"), ("a.png", "of the png"), ("b.png", "first"),
    ]  # fmt: skip
    assert sidecar.drops == {"no_image": 2}


HF_ROWS = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(4)]
LISTS = {
    "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in HF_ROWS),
    "metadata.csv": "file_name,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(4)),
    "bom.csv": "\ufefffile_name,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(4)),
    "windows.csv": "file_name,caption\r\n" + "".join(f".\\{i}.png,caption {i}\r\n" for i in range(4)),
    "absolute.csv": "file_name,caption\n" + "".join(f"HERE/{i}.png,caption {i}\n" for i in range(4)),
    "list.tsv": "text\tfile_name\n" + "".join(f"caption {i}\t.//{i}.png\n" for i in range(4)),
    "list.json": json.dumps(HF_ROWS),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_an_image_folder(tmp_path, name):
    root = write(tmp_path / "in", {f"{i}.png": picture(i) for i in range(4)})
    (root / name).write_text(LISTS[name].replace("HERE", str(root.resolve())), newline="")
    found_by_itself = name.startswith("metadata")
    config = FolderConfig(path=str(root), captions=None if found_by_itself else str(root / name))
    (sidecar,) = run(config, tmp_path / "out", 100)
    assert list(read(tmp_path / "out", [sidecar]).values()) == [
        (f"{i}.png", f"caption {i}") for i in range(4)
    ]
    assert not sidecar.drops


def test_lists_that_are_found_are_never_mixed_up(tmp_path):
    files = {"0.png": picture(), "0.txt": b"beside", "metadata.csv": b"file_name,text\n0.png,listed\n"}
    root = write(tmp_path / "in", files)
    (sidecar,) = run(FolderConfig(path=str(root)), tmp_path / "a")
    assert list(read(tmp_path / "a", [sidecar]).values()) == [("0.png", "listed")]
    (sidecar,) = run(FolderConfig(path=str(root), captions="beside"), tmp_path / "b")
    assert list(read(tmp_path / "b", [sidecar]).values()) == [("0.png", "beside")]
    write(root, {"metadata.jsonl": b"{}"})
    with pytest.raises(
        ValueError, match=r"source\.captions: .* has metadata\.csv and metadata\.jsonl; name one"
    ):
        jobs(FolderConfig(path=str(root)))


def test_a_bad_line_of_a_list_costs_its_own_sample(tmp_path):
    root = write(tmp_path / "in", {f"{i}.png": picture(i) for i in range(6)})
    rows = [
        {"file_name": "0.png", "caption": "fine", "score": float("nan")},
        {"file_name": "1.png", "caption": 5},
        {"file_name": "2.png", "caption": ["a", "b"]},
        {"file_name": "3.png", "caption": "nul \0"},
        {"file_name": "4.png", "caption": "x", "score": "half \ud800"},
        {"file_name": 5, "caption": "x"},
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FolderConfig(path=str(root), extra_columns=("score",))
    (sidecar,) = run(config, tmp_path / "out", 100)
    assert list(read(tmp_path / "out", [sidecar]).values()) == [("0.png", "fine")]
    assert sidecar.drops == {
        "not_text": 1, "several_captions": 1, "undecodable_caption": 1, "undecodable_metadata": 1,
        "not_in_list": 1, "not_on_disk": 1,
    }  # fmt: skip
