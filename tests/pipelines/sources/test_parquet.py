"""Parquet rows -> samples: each kept or counted, only the row groups needed, the same bytes again."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources import parquet as parquet_source
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.parquet import ParquetConfig, ParquetWorker, jobs

AS_IS = IngestConfig(image_size=None, max_drop_fraction=1)


def picture(index: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (index % 256, 7, 9)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, first: int, number: int, group: int = 7, as_struct: bool = True) -> Path:
    """Rows first to first + number, in the layout of Hugging Face `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = range(first, first + number)
    images = [picture(row) for row in rows]
    column = (
        pa.array([{"bytes": data, "path": f"{row}.png"} for row, data in zip(rows, images, strict=True)])
        if as_struct
        else pa.array(images, pa.large_binary())
    )
    extra = pa.array([[f"long {row}", "longer"] for row in rows])
    score = pa.array([float("nan") if row % 2 else row / 4 for row in rows])
    table = pa.table(
        {"image": column, "caption": [f"picture {row}" for row in rows], "long": extra, "score": score}
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def run(
    config: ParquetConfig, to: Path, size: int = 10, ingest: IngestConfig = AS_IS, reverse: bool = False
) -> list[Sidecar]:
    worker = ParquetWorker(Folder.at(to), config, ingest)
    listed = jobs(config.model_copy(update={"shard_size": size}))
    return sorted(
        (worker(job) for job in (reversed(listed) if reverse else listed)), key=lambda one: one.name
    )


def read(folder: Path, *names: str) -> dict[str, dict[str, bytes]]:
    return {key: one for name in names for key, one in read_samples(Folder.at(folder), f"{name}.tar")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "in" / "train-0.parquet", 0, 16)
    write(tmp_path / "in" / "train-1.parquet", 16, 0)
    write(tmp_path / "in" / "train-2.parquet", 16, 17, as_struct=False)
    return tmp_path / "in"


def test_shards_run_over_files_and_row_groups(tmp_path, data):
    config = ParquetConfig(path=str(data), extra_columns=("long", "score"))
    sidecars = run(config, tmp_path / "out")
    assert [one.samples for one in sidecars] == [10, 10, 10, 3] and not any(one.drops for one in sidecars)
    found = read(tmp_path / "out", *(one.name for one in sidecars))
    assert list(found) == [f"{row:09d}" for row in range(33)]
    for row, members in enumerate(found.values()):
        assert members["txt"] == f"picture {row}".encode() and members["png"] == picture(row)
        metadata = json.loads(members["json"])
        assert metadata["long"] == [f"long {row}", "longer"] and metadata["score"] == (
            None if row % 2 else row / 4
        )
    first, last = (json.loads(found[key]["json"]) for key in ("000000015", "000000032"))
    assert (first["source_file"], first["source_row"], first["source_path"]) == (
        "train-0.parquet",
        15,
        "15.png",
    )
    assert (last["source_file"], last["source_row"], last["width"]) == ("train-2.parquet", 16, 20)
    assert "source_path" not in last


def test_the_same_bytes_in_any_order_and_whatever_the_row_groups(tmp_path, data):
    config = ParquetConfig(path=str(data / "*.parquet"), extra_columns=("long",))
    first = run(config, tmp_path / "a")
    assert [one.sha256 for one in run(config, tmp_path / "b", reverse=True)] == [one.sha256 for one in first]
    write(data / "train-0.parquet", 0, 16, group=100)
    assert [one.sha256 for one in run(config, tmp_path / "c")] == [one.sha256 for one in first]


def test_only_the_shards_of_a_changed_file_are_made_again(data):
    config = ParquetConfig(path=str(data), shard_size=10)
    before = [job.inputs for job in jobs(config)]
    assert [list(inputs) for inputs in before] == [
        ["train-0.parquet"],
        ["train-0.parquet", "train-2.parquet"],
        ["train-2.parquet"],
        ["train-2.parquet"],
    ]
    os.utime(data / "train-0.parquet", ns=(1, 1))
    after = [job.inputs for job in jobs(config)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, False, True, True]
    write(data / "train-1.parquet", 16, 1)
    assert not any(
        old == new
        for old, new in zip(
            after[1:],
            [job.inputs for job in jobs(config)][1:],
            strict=False,
        )
    )


def test_rows_without_image_or_caption_are_counted(tmp_path):
    images = [
        {"bytes": picture(0), "path": "a"},
        {"bytes": None, "path": "b"},
        None,
        {"bytes": b"junk", "path": "d"},
    ]
    images += [{"bytes": picture(1), "path": None}] * 2
    table = pa.table({"image": images, "caption": ["fine", "x", "x", "x", None, ""]})
    pq.write_table(table, tmp_path / "in.parquet")
    (sidecar,) = run(ParquetConfig(path=str(tmp_path / "in.parquet")), tmp_path / "out")
    # an empty caption is curate's to judge
    assert sidecar.samples == 2 and sidecar.drops == {"no_caption": 1, "no_image": 2, "undecodable_image": 1}
    drops = pq.read_table(tmp_path / "out" / "00000.drops.parquet").to_pylist()
    assert drops[0] == {
        "key": "000000001",
        "reason": "no_image",
        "detail": "in.parquet, row 1: no bytes, only the path b; a folder source reads files",
    }


def test_a_probe_reads_every_so_manieth_row(tmp_path, data):
    config = ParquetConfig(path=str(data))
    assert parquet_source.num_entries(config) == 33
    worker = ParquetWorker(Folder.at(tmp_path / "out"), config, AS_IS)
    (job,) = parquet_source.probe_jobs(config, 8, 1)
    assert worker(job).samples == 8
    assert [int(key) for key in read(tmp_path / "out", "00000")] == list(range(1, 33, 4))
    bare = {"start": 2, "stop": 33, "step": 20}
    worker(type(job)("00001", "", {}, bare))
    assert [int(key) for key in read(tmp_path / "out", "00001")] == [2, 22]


def test_memory_stays_bounded_by_a_few_rows(tmp_path):
    """A row group of 64 MB is read without holding it: the peak is measured in a process of its own."""
    import subprocess
    import sys

    number = 64
    rows = {"image": [os.urandom(1 << 20) for _ in range(number)], "caption": ["x"] * number}
    # the writer ends a page only after so many rows, whatever their size
    options = {
        "row_group_size": number,
        "compression": "none",
        "use_dictionary": False,
        "write_batch_size": 2,
    }
    pq.write_table(pa.table(rows), tmp_path / "in.parquet", **options)
    code = (
        "import pyarrow as pa\n"
        "from pipelines.sources.parquet import ParquetConfig, _Rows, list_parts\n"
        f"config = ParquetConfig(path={str(tmp_path / 'in.parquet')!r})\n"
        "(part,) = list_parts(config)\n"
        "with _Rows(part.file, config) as rows:\n"
        "    assert sum(len(values['image']) for _, values in rows.read(range(64))) == 64 << 20\n"
        "print(pa.default_memory_pool().max_memory() >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 56


def test_files_in_a_bucket(tmp_path, data, s3_folder):
    for path in data.iterdir():
        s3_folder.write(path.name, path.read_bytes())
    expected = run(ParquetConfig(path=str(data)), tmp_path / "local")
    config = ParquetConfig(path=f"{s3_folder.url}/train-*.parquet", options=dict(s3_folder.options))
    assert [one.sha256 for one in run(config, tmp_path / "remote")] == [one.sha256 for one in expected]


def test_a_damaged_file_is_named(tmp_path, data):
    (data / "train-0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"train-0\.parquet is not readable as parquet"):
        jobs(ParquetConfig(path=str(data), shard_size=10))


def test_a_damaged_page_fails_its_shard(tmp_path):
    path = write(tmp_path / "in.parquet", 0, 30, group=100)
    config = ParquetConfig(path=str(path), shard_size=100)
    (job,) = jobs(config)
    content = bytearray(path.read_bytes())
    content[4:64] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"in\.parquet: damaged \(.*\); replace it"):
        ParquetWorker(Folder.at(tmp_path / "out"), config, AS_IS)(job)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_column": "picture"},
            r"has no column 'picture' .*; it has \['image', 'caption', 'long', 'score'\]",
        ),
        (
            {"image_column": "caption"},
            r"column 'caption' \(source.image_column\) is string; expected binary or a struct",
        ),
        ({"caption_column": "score"}, r"column 'score' \(source.caption_column\) is double; expected text"),
        (
            {"extra_columns": ("image",)},
            r"column 'image' \(source.extra_columns\) is .*; expected text, numbers",
        ),
        ({"extra_columns": ("width",)}, r"\['width'\] are names that the sample's json has already"),
        ({"path": "nowhere-*.parquet"}, "nowhere-.* leads to no file"),
    ],
)
def test_columns_that_do_not_fit(data, fields, message):
    with pytest.raises(ValueError, match=message):
        jobs(ParquetConfig(**{"shard_size": 10, "path": str(data), **fields}))


def test_what_decides_the_bytes():
    base = parquet_source.fingerprint_fields(ParquetConfig(path="a"), IngestConfig())
    assert base == parquet_source.fingerprint_fields(
        ParquetConfig(path="b", options={"x": 1}), IngestConfig()
    )
    other = ParquetConfig(path="a", extra_columns=("long",))
    assert base != parquet_source.fingerprint_fields(other, IngestConfig())


def test_captions_are_lists(tmp_path):
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(2)]
    pq.write_table(pa.table({"image": images, "caption": [["c", "other"], ["d"]]}), tmp_path / "in.parquet")
    config = ParquetConfig(path=str(tmp_path / "in.parquet"))
    with pytest.raises(
        ValueError, match=r"in\.parquet: column 'caption' .* is list.*several_captions to first"
    ):
        jobs(config)
    (sidecar,) = run(config.model_copy(update={"several_captions": "all"}), tmp_path / "out")
    found = read(tmp_path / "out", sidecar.name).values()
    assert [(one["txt"], json.loads(one["json"])["all_captions"]) for one in found] == [
        (b"c", ["c", "other"]), (b"d", ["d"]),
    ]  # fmt: skip


def test_paths_without_bytes_are_counted_with_the_path(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": f"/data/{i}.png"} for i in range(2)], kind)
    pq.write_table(pa.table({"image": images, "caption": ["x"] * 2}), tmp_path / "in.parquet")
    config = ParquetConfig(path=str(tmp_path / "in.parquet"))
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.drops == {"no_image": 2}
    with pytest.raises(ShardError, match=r"2 of 2 samples dropped.*no_image 2; .*only the path /data/0\.png"):
        run(config, tmp_path / "out", ingest=IngestConfig(image_size=None))


def test_text_that_is_not_utf8_costs_its_own_row(tmp_path):
    """Careless writers leave such text in columns of text."""

    def column(values: list[bytes]) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    names = ["caption", "long"]
    texts = [column([b"fine", b"caf\xe9", b"fine", b"nul \0"]), column([b"a", b"b", b"\xff", b"c"])]
    images = pa.array([picture(i) for i in range(4)], pa.binary())
    pq.write_table(pa.table([images, *texts], names=["image", *names]), tmp_path / "in.parquet")
    config = ParquetConfig(path=str(tmp_path / "in.parquet"), extra_columns=("long",))
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.samples == 1 and sidecar.drops == {"undecodable_caption": 2, "undecodable_metadata": 1}
