"""Lists of every kind that people have: the right rows, or an error that names file, column or byte."""

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.lists.blocks import ArrowBlock
from pipelines.lists.captions import one_text
from pipelines.lists.columns import caption_column, json_column, text_column
from pipelines.lists.tables import CsvFormat, open_table
from pipelines.lists.values import BadEntry

ROWS = [{"url": f"http://h/{i}.png", "caption": f"caption {i}"} for i in range(4)]
NEEDED = [text_column("url", "source.url_column"), caption_column("caption", "source.caption_column", "x")]
CSV = "url,caption\n" + "".join(f"{row['url']},{row['caption']}\n" for row in ROWS)
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: object, needed=NEEDED, **csv) -> list[dict]:
    names = [one.name for one in needed]
    with open_table(str(path), {}, needed, f"source.path: {path}", CsvFormat(**csv)) as table:
        blocks = [block for section in range(table.num_sections) for block in table.blocks(section)]
        assert sum(map(len, blocks)) == sum(table.num_rows(one) for one in range(table.num_sections))
        columns = {name: [cell for block in blocks for cell in block.cells(name)] for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def plain_files() -> dict[str, bytes]:
    lines = [(row["url"], row["caption"]) for row in ROWS]
    array = json.dumps(ROWS, indent=1)
    return {
        "a.csv": CSV.encode(),
        "UPPER.CSV": CSV.encode(),
        "bom.csv": CSV.encode("utf-8-sig"),
        "windows.csv": CSV.replace("\n", "\r\n").encode(),
        "open-ended.csv": CSV.rstrip("\n").encode(),
        "quoted.csv": ('url,caption\n' + "".join(f'"{u}","{c}"\n' for u, c in lines)).encode(),
        "more.csv": ("n,caption,url\n" + "".join(f"{len(u)},{c},{u}\n" for u, c in lines)).encode(),
        "a.csv.gz": gzip.compress(CSV.encode()),
        "two.csv.gz": gzip.compress(CSV[:20].encode()) + gzip.compress(CSV[20:].encode()),
        "a.tsv": CSV.replace(",", "\t").encode(),
        "a.TSV.GZ": gzip.compress(CSV.replace(",", "\t").encode()),
        "a.jsonl": JSONL.encode(),
        "bom.jsonl": JSONL.encode("utf-8-sig"),
        "blank.jsonl": JSONL.replace("\n", "\r\n\r\n").encode(),
        "a.jsonl.gz": gzip.compress(JSONL.encode()),
        "a.json": array.encode(),
        "bom.json": array.encode("utf-8-sig"),
        "spaced.json": b"\n  " + array.encode(),
        "lines.json": JSONL.encode(),
        "a.json.gz": gzip.compress(array.encode()),
    }  # fmt: skip


@pytest.mark.parametrize("name", plain_files())
def test_the_rows_are_the_same_in_any_format(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(plain_files()[name])
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_files_at_a_url(name: str):
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/tables/{name}", plain_files()[name])
    assert read(f"memory://tables/{name}") == ROWS


def test_another_delimiter_and_no_heading(tmp_path: Path):
    (tmp_path / "a.csv").write_text(CSV.replace(",", ";"))
    assert read(tmp_path / "a.csv", delimiter=";") == ROWS
    (tmp_path / "b.csv").write_text(CSV.replace(",", "\t"))
    assert read(tmp_path / "b.csv", delimiter="\\t") == ROWS
    (tmp_path / "cc.tsv").write_text("".join(f"{row['caption']}\t{row['url']}\n" for row in ROWS))
    assert read(tmp_path / "cc.tsv", column_names=("caption", "url")) == ROWS


def test_other_columns_may_change_their_kind_later(tmp_path: Path):
    """Nobody asked for them: types that the first block suggests do not count."""
    lines = [f"http://h/{i},c,{i}\n" for i in range(100_000)]
    (tmp_path / "a.csv").write_text("url,caption,n\n" + "".join(lines) + "http://h/x,c,unknown\n")
    assert len(read(tmp_path / "a.csv")) == 100_001


def test_numbers_and_texts_of_a_json_column(tmp_path: Path):
    values = [1, 0.5, None, float("nan"), "x", [1], True]
    rows = [{"url": f"u{i}", "caption": "c", "score": value} for i, value in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    needed = [*NEEDED, json_column("score", "source.extra_columns")]
    with open_table(str(tmp_path / "a.jsonl"), {}, needed, "source.path: a") as table:
        (block,) = table.blocks(0)
        column, bad = block.column("score")
    assert column.to_pylist() == [1, 0.5, None, None, None, None, None]
    assert sorted(bad) == [4, 5, 6] and "'score' is a str among values of type float" in bad[4].detail


LATIN = CSV.replace("caption 2", "café 2").encode("latin-1")
ERRORS = {
    "semicolon.csv": (CSV.replace(",", ";").encode(), r"has no column 'url' \(source\.url_column\); it has "
                      r"\['url;caption'\]; are its cells separated by ';'\? Set source\.csv\.delimiter"),
    "headless.csv": (CSV.partition("\n")[2].encode(), r"no column 'url'.*0'\]; if it has no heading, "
                     r"give source\.csv\.column_names"),
    "other.csv": (CSV.replace("caption\n", "text\n").encode(), r"no column 'caption' .*\['url', 'text'\]$"),
    "twice.csv": (b"url,caption,url\na,b,c\n", r"has 2 columns 'url' \(source\.url_column\); rename"),
    "ragged.csv": (CSV.encode() + b"http://h/9,one, two\n", r"readable as csv: .*Row #6: Expected 2"),
    "latin1.csv": (LATIN, rf"not readable as csv: byte {LATIN.index(0xE9)}, in line 4, is no UTF-8; convert"),
    "latin1.jsonl": (JSONL.replace("caption 2", "café 2").encode("latin-1"), r"JSON: byte .*, in line 3"),
    "utf16.tsv": (CSV.encode("utf-16"), r"byte 0, in line 1, is no UTF-8"),
    "empty.csv": (b"", r"no column 'url' .*; it has \[\]"),
    "empty.jsonl": (b"", r"no column 'url' .*; it has \[\]"),
    "cut.csv.gz": (gzip.compress(CSV.encode())[:-12], r"not readable as csv: .*[Tt]runcated"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode())[:-12], r"not readable as JSON: Compressed file ended"),
    "plain.csv.gz": (CSV.encode(), r"not readable as csv: "),
    "plain.jsonl.gz": (JSONL.encode(), r"not readable as JSON: Not a gzipped file"),
    "broken.jsonl": (JSONL.encode() + b'{"url": \n', r"not readable as JSON: line 5: Expecting value"),
    "cut.json": (json.dumps(ROWS).encode()[:-9], r"not readable as JSON: "),
    "numbers.jsonl": (b"1\n2\n", r"not readable as JSON: row 1 is no object"),
    "deep.jsonl": (b'{"url":' + b"[" * 100_000 + b"\n", r"not readable as JSON: maximum recursion"),
    "coco.json": (json.dumps({"annotations": ROWS}, indent=1).encode(), r"not readable as JSON: line 1: "),
    "junk.parquet": (b"junk" * 99, r"is not readable as parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    data, message = ERRORS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^source\.path: .*{name}.*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"url": [{"src": "u"}]},
            r"column 'url' \(source\.url_column\) is struct<src: string>; expected",
        ),
        (
            {"caption": [["a", "b"]]},
            r"column 'caption' \(source\.caption_column\) is list<.*>; expected",
        ),
        ({"caption": [1]}, r"column 'caption' \(source\.caption_column\) is int64; expected text"),
        ({"caption": pa.array([0], pa.timestamp("s"))}, r"column 'caption' .* is timestamp"),
    ],
)
def test_types_that_do_not_fit_name_column_and_file(tmp_path: Path, columns: dict, message: str):
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"], **columns}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"source\.path: .*a\.parquet: {message}"):
        read(tmp_path / "a.parquet")


def test_the_first_byte_that_is_no_utf8_is_named_across_blocks(tmp_path: Path):
    head = b"url,caption\n" + ("é" * 700_001 + ",x\n").encode() * 2
    (tmp_path / "a.csv").write_bytes(head + b"u,\xff\n")
    with pytest.raises(ValueError, match=rf"byte {len(head) + 2:,}, in line 4, is"):
        read(tmp_path / "a.csv")


def test_a_missing_file_is_none(tmp_path: Path):
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / name)


@given(
    st.lists(st.text() | st.sampled_from(["\ufeffa", "a\ufeff", "\x85", "\x7f", "\0", "\t\r\n"]) | st.none())
)
def test_text_is_plain_only_where_nothing_would_change_it(values):
    block = ArrowBlock(pa.table({"text": pa.array(values, pa.string())}))
    column = block.plain_text("text")
    try:
        is_plain = all(one_text(value) == value for value in values)
    except BadEntry:
        is_plain = False
    assert (column is not None) == is_plain
    assert column is None or column.to_pylist() == [value or "" for value in values]


VALID = {**plain_files(), "a.parquet": b""}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@given(st.sampled_from(sorted(VALID)), st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_rows_or_an_error_that_names_the_file(scratch: Path, name: str, draw: st.DataObject):
    """Never another exception, whatever was changed, cut off or put in between."""
    data = VALID[name]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), scratch / "whole.parquet")
        data = (scratch / "whole.parquet").read_bytes()
    at = draw.draw(st.integers(0, len(data)))
    data = data[:at] + draw.draw(st.binary(max_size=20)) + data[at + draw.draw(st.integers(0, 20)) :]
    (scratch / name).write_bytes(data)
    try:
        assert all(row.keys() == {"url", "caption"} for row in read(scratch / name))
    except ValueError as error:
        assert name in str(error)


def test_a_store_that_does_not_answer_is_the_fault_of_who_asks_for_it():
    """Not of the workflow's root, and no traceback."""
    from pipelines.sources.inputs import find_inputs

    options = {
        **{"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:9"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1},
    }
    with pytest.raises(ValueError, match=r"^source\.path: s3://bucket/x: \w+: .*127\.0\.0\.1:9"):
        find_inputs("s3://bucket/x", (".tar",), "source.path", options)
    place = "captions.path: s3://bucket/x.csv"
    with (
        pytest.raises(ValueError, match=rf"^{place}: \w+: "),
        open_table("s3://bucket/x.csv", options, [], place),
    ):
        pass
