"""Lists of addresses in one file or many, parquet or csv, and the shards they become."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.lists import tables
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError
from pipelines.sources.urls import UrlList, UrlListWorker, UrlsConfig, find_files, num_rows

ROWS = 1000


def table(start: int, stop: int) -> pa.Table:
    columns = {
        "link": [f"u{i}" for i in range(start, stop)],
        "text": [f"line one\nof {i}" for i in range(start, stop)],
        "likes": list(range(start, stop)),
    }
    return pa.table(columns)


def write_csv(path: Path, rows: pa.Table) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(reversed(rows.column_names))
        writer.writerows(reversed(row.values()) for row in rows.to_pylist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """600 rows in row groups of 70, an empty file, 150 more, 250 as csv."""
    lists = tmp_path / "lists"
    lists.mkdir()
    pq.write_table(table(0, 600), lists / "a.parquet", row_group_size=70)
    pq.write_table(table(0, 0), lists / "b.parquet")
    pq.write_table(table(600, 750), lists / "c.parquet")
    write_csv(lists / "d.csv", table(750, ROWS))
    (lists / "_SUCCESS").touch()
    return lists


def config(path: object, **fields) -> UrlsConfig:
    return UrlsConfig.model_validate(
        {"path": str(path), "url_column": "link", "caption_column": "text", **fields}
    )


@pytest.mark.parametrize(
    "wanted",
    [
        range(0, 10),
        range(0, ROWS),
        range(65, 75),
        range(590, 760),
        range(740, 1000),
        range(999, 1000),
        range(0, ROWS, 97),
        range(3, 1000, 400),
    ],
)
def test_rows_are_found_wherever_they_lie(folder, wanted):
    rows, bad = UrlList(config(folder)).read(wanted)
    assert not bad
    assert rows["url"].to_pylist() == [f"u{i}" for i in wanted]
    assert rows["caption"].to_pylist() == [f"line one\nof {i}" for i in wanted]


def test_reading_forth_and_back(folder):
    urls = UrlList(config(folder))
    assert len(urls) == ROWS == num_rows(config(folder))
    assert [file.rows for file in urls.files] == [600, 0, 150, 250]
    for wanted in (range(800, 900), range(900, 950), range(760, 770), range(10, 20), range(20, 30)):
        assert urls.read(wanted)[0]["url"].to_pylist() == [f"u{i}" for i in wanted]


def test_only_the_row_groups_that_are_needed_are_read(folder):
    """Row groups that nobody asks for may even be damaged."""
    path = folder / "a.parquet"
    urls = UrlList(config(path))
    group = pq.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("r+b") as stream:
        stream.seek(group.data_page_offset)
        stream.write(b"\xff" * group.total_compressed_size)
    assert urls.read(range(70, 600, 10))[0]["url"].to_pylist() == [f"u{i}" for i in range(70, 600, 10)]
    with pytest.raises((OSError, ValueError)):
        urls.read(range(0, 5))


def test_a_csv_is_read_once_by_ascending_jobs(folder, monkeypatch):
    write_csv(folder / "d.csv", table(0, 100_000))
    urls = UrlList(config(folder / "d.csv"))
    opened = []
    real = tables.native_file
    monkeypatch.setattr(tables, "native_file", lambda path: opened.append(path) or real(path))
    for start in range(0, 100_000, 10_000):
        assert len(urls.read(range(start, start + 500))[0]) == 500
    assert len(opened) == 1
    urls.read(range(0, 1))
    assert len(opened) == 2


def test_large_csv_files_need_little_memory(tmp_path):
    """The whole is never there: a list of 80 MB is read through blocks of 1 MB."""
    with (tmp_path / "l.csv").open("w") as stream:
        stream.write("url,caption\n")
        for i in range(200_000):
            stream.write(f"http://example.org/{i},{'x' * 370}\n")
    usual, pool = pa.default_memory_pool(), pa.system_memory_pool()
    # a pool that nothing else uses: its peak is that of this test
    pa.set_memory_pool(pool)
    try:
        urls = UrlList(UrlsConfig(path=str(tmp_path / "l.csv")))
        assert len(urls) == 200_000
        assert urls.read(range(199_990, 200_000))[0]["url"][9].as_py() == "http://example.org/199999"
        peak = pool.max_memory()
    finally:
        pa.set_memory_pool(usual)
    # 40 MB for a file of any size: Arrow reads 32 blocks ahead
    assert peak is not None and 0 < peak < 45e6


def test_files_patterns_folders_and_urls(folder):
    assert [Path(name).name for name in find_files(config(folder))] == [
        "a.parquet", "b.parquet", "c.parquet", "d.csv",
    ]  # fmt: skip
    assert num_rows(config(folder / "a.parquet")) == 600
    assert num_rows(config(folder / "[ac].parquet")) == 750
    assert num_rows(config(f"file://{folder}/*.csv")) == 250
    memory = fsspec.filesystem("memory")
    memory.pipe("/lists/one.parquet", (folder / "a.parquet").read_bytes())
    memory.pipe("/lists/two.csv", (folder / "d.csv").read_bytes())
    rows, _ = UrlList(config("memory://lists")).read(range(595, 605))
    assert rows["url"].to_pylist() == [f"u{i}" for i in [*range(595, 600), *range(750, 755)]]


def test_what_is_no_list_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"source\.path: .*none.* leads to no file"):
        find_files(config(tmp_path / "none.csv"))
    (tmp_path / "l.txt").write_text("u1")
    with pytest.raises(ValueError, match=r"l\.txt: expected a name that ends in"):
        find_files(config(tmp_path / "*.txt"))
    for name in ("c.parquet", "d.csv"):
        with pytest.raises(
            ValueError, match=rf"{name} has no column 'url' \(source\.url_column\); it has \["
        ):
            num_rows(UrlsConfig(path=str(folder / name)))
    (tmp_path / "torn.csv").write_text("link,text\nu1,a\nu2,b,c\n")
    with pytest.raises(ValueError, match=r"torn\.csv is not readable as csv"):
        num_rows(config(tmp_path / "torn.csv"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty\.csv has no column 'link'"):
        num_rows(config(tmp_path / "empty.csv"))


def test_a_list_that_changed_since_it_was_counted(folder):
    counted = UrlList(config(folder / "d.csv"))
    write_csv(folder / "d.csv", table(0, 10))
    with pytest.raises(ValueError, match="ends before row 240 of 250; it changed"):
        counted.read(range(240, 250))


def test_extra_columns(tmp_path):
    rows = {
        "url": ["a", None],
        "caption": [None, "b"],
        "long": ["aa", None],
        "score": [0.5, float("nan")],
        "tags": [["x"], []],
        "when": pa.array([0, 1], pa.timestamp("s")),
    }
    pq.write_table(pa.table(rows), tmp_path / "l.parquet")
    path = str(tmp_path / "l.parquet")
    read, _ = UrlList(UrlsConfig(path=path, extra_columns=("long", "score", "tags"))).read(range(2))
    assert read.to_pylist() == [
        {"url": "a", "caption": "", "long": "aa", "score": 0.5, "tags": ["x"]},
        {"url": "", "caption": "b", "long": None, "score": None, "tags": []},
    ]
    with pytest.raises(ValueError, match=r"column 'when' \(source.extra_columns\) is timestamp"):
        num_rows(UrlsConfig(path=path, extra_columns=("when",)))
    (tmp_path / "m.csv").write_text("url,caption,long,score\nc,c,cc,high\n")
    mixed = UrlsConfig(path=str(tmp_path), extra_columns=("score",))
    with pytest.raises(ValueError, match=r"disagree about a type: .*score"):
        UrlList(mixed).read(range(3))
    with pytest.raises(ValueError, match=r"(?s)extra_columns.*\['width'\] are names .*rename"):
        UrlsConfig(path=path, extra_columns=("width",))


def test_shards_of_a_list(folder, tmp_path):
    """The same whoever makes them in which order, with keys of the rows' positions in the whole."""
    jobs = [
        ShardJob(f"{i:05d}", "f", {}, {"start": start, "stop": min(start + 130, ROWS)})
        for i, start in enumerate(range(0, ROWS, 130))
    ]
    forward = UrlListWorker(Folder.at(tmp_path / "forward"), config(folder))
    backward = UrlListWorker(Folder.at(tmp_path / "backward"), config(folder), forward.list.files)
    hashes = [forward(job).sha256 for job in jobs]
    assert [backward(job).sha256 for job in reversed(jobs)] == hashes[::-1]
    rows = [
        row for job in jobs for row in pq.read_table(tmp_path / "forward" / f"{job.name}.parquet").to_pylist()
    ]
    assert [row["key"] for row in rows] == [f"{i:09d}" for i in range(ROWS)]
    assert rows[805] == {"key": "000000805", "url": "u805", "caption": "line one\nof 805"}


def test_a_sample_of_a_list_keeps_the_keys(folder, tmp_path):
    worker = UrlListWorker(Folder.at(tmp_path / "probe"), config(folder))
    sidecar = worker(ShardJob("00000", "f", {}, {"start": 1, "stop": ROWS, "step": 300}))
    rows = pq.read_table(tmp_path / "probe" / "00000.parquet").to_pylist()
    assert sidecar.samples == 4
    assert [row["key"] for row in rows] == ["000000001", "000000301", "000000601", "000000901"]
    assert [row["url"] for row in rows] == ["u1", "u301", "u601", "u901"]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_rows_are_counted_drops_of_the_list(tmp_path):
    rows = [
        {"url": "u0", "caption": "fine", "score": 0.5},
        {"url": "u1", "caption": 5},
        {"url": {"src": "u2"}, "caption": "x"},
        {"url": "u3", "caption": "nul \0"},
        {"caption": "no address", "score": float("nan")},
        {"url": "u5", "caption": "x", "score": "high"},
        {"url": "u6"},
    ]
    config = UrlsConfig(path=write_jsonl(tmp_path / "l.jsonl", rows), extra_columns=("score",))
    job = ShardJob("00000", "f", {}, {"start": 0, "stop": len(rows)})
    sidecar = UrlListWorker(Folder.at(tmp_path / "out"), config)(job)
    assert pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist() == [
        {"key": "000000000", "url": "u0", "caption": "fine", "score": 0.5},
        {"key": "000000004", "url": "", "caption": "no address", "score": None},
        {"key": "000000006", "url": "u6", "caption": "", "score": None},
    ]
    assert sidecar.samples == 3 and sidecar.drops == {
        "invalid_url": 1, "not_text": 1, "undecodable_caption": 1, "undecodable_metadata": 1,
    }  # fmt: skip
    listed = pq.read_table(tmp_path / "out" / "00000.drops.parquet").to_pylist()
    assert [row["key"] for row in listed] == [f"{i:09d}" for i in (1, 2, 3, 5)]
    assert listed[0]["detail"] == "row 1: the caption is a number, expected text"
    strict = UrlListWorker(Folder.at(tmp_path / "strict"), config, max_drop_fraction=0.5)
    with pytest.raises(ShardError, match=r"4 of 7 samples dropped, more than max_drop_fraction 0\.5"):
        strict(job)


def test_all_captions_of_a_row_go_into_the_list(tmp_path):
    rows = [{"url": "u", "caption": ["a", " b "]}, {"url": "u", "caption": "c\nd"}, {"url": "u"}]
    path = write_jsonl(tmp_path / "l.jsonl", rows)
    read, bad = UrlList(UrlsConfig(path=path, several_captions="all")).read(range(3))
    assert not bad and read.to_pylist() == [
        {"url": "u", "caption": "a", "all_captions": ["a", "b"]},
        {"url": "u", "caption": "c", "all_captions": ["c", "d"]},
        {"url": "u", "caption": "", "all_captions": []},
    ]


def test_lists_of_all_formats_by_one_pattern(folder, tmp_path):
    lists = tmp_path / "mixed"
    lists.mkdir()
    for index, name in enumerate(["l-000.csv", "l-001.CSV", "l-002.jsonl", "l-003.parquet"]):
        rows = table(index * 10, index * 10 + 10)
        if name.lower().endswith(".csv"):
            write_csv(lists / name, rows)
        elif name.endswith(".jsonl"):
            write_jsonl(lists / name, rows.to_pylist())
        else:
            pq.write_table(rows, lists / name)
    (lists / "_stats.json").write_text("{}")
    for path in (lists, f"{lists}/l-{{000..003}}.*"):
        urls = UrlList(config(path))
        assert [file.rows for file in urls.files] == [10] * 4
        assert urls.read(range(0, 40, 7))[0]["url"].to_pylist() == [f"u{i}" for i in range(0, 40, 7)]


@pytest.mark.slow
def test_large_jsonl_files_need_little_memory(tmp_path):
    """A block at a time: the peak is measured in a process of its own."""
    with (tmp_path / "l.jsonl").open("w") as stream:
        for i in range(100_000):
            stream.write(json.dumps({"url": f"http://example.org/{i}", "caption": "x" * 400}) + "\n")
    code = (
        "import pyarrow, resource\n"
        "from pipelines.sources.urls import UrlList, UrlsConfig\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        f"urls = UrlList(UrlsConfig(path={str(tmp_path / 'l.jsonl')!r}))\n"
        "assert len(urls) == 100_000 and len(urls.read(range(99_990, 100_000))[0]) == 10\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80


def test_a_column_whose_lists_are_of_several_types_is_named(tmp_path):
    rows = [{"url": "u", "caption": "c", "tags": tags} for tags in (["a"], [1], [{"x": 2}])]
    config = UrlsConfig(path=write_jsonl(tmp_path / "l.jsonl", rows), extra_columns=("tags",))
    with pytest.raises(
        ValueError, match=r"source\.extra_columns: .*l\.jsonl: column 'tags' has values of sev"
    ):
        UrlList(config).read(range(3))
