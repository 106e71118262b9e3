"""Alternative captions: from the json or from a table, each one present or lacking for a counted reason."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.pool import ShardJob
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.stages.captions import (
    CaptionConfig,
    CaptionsConfig,
    CaptionsWorker,
    count_coverage,
    fingerprint_fields,
)
from repfusion.llm.tokenizer import CaptionLimit
from repfusion.weights import WEIGHTS

NUM_SHARDS, SHARD_SIZE = 3, 4
KEYS = [f"{index:09d}" for index in range(NUM_SHARDS * SHARD_SIZE)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`curate`: sample i has the url u<i>, the number 100 + i, and a field `long`, spoilt for some."""
    odd = {1: None, 2: 7, 3: "   ", 5: "x" * 50}
    for shard in range(NUM_SHARDS):
        with ShardCommit(Folder.at(tmp_path / "curate"), f"{shard:05d}", "f", {}) as commit:
            with tar_shard(commit) as samples:
                for index in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
                    record = {"key": KEYS[index], "url": f"u{index}", "number": 100 + index}
                    record["long"] = odd.get(index, f" long {index}\n")
                    members = {"png": b"image", "txt": b"main", "json": json.dumps(record).encode()}
                    if index == 6:
                        del members["json"]
                    samples.write(KEYS[index], members)
            commit.commit(f"{shard:05d}.tar")
    return tmp_path


def write_table(path: Path, keys: list, texts: list, group: int = 100, **more) -> str:
    pq.write_table(pa.table({**more, "key": keys, "caption": texts}), path, row_group_size=group)
    return str(path)


def run(
    root: Path, columns: dict[str, CaptionConfig], to: str = "captions", order: list[int] | None = None
) -> list[Sidecar]:
    worker = CaptionsWorker(
        Folder.at(root / to), Folder.at(root / "curate"), CaptionsConfig(captions=columns)
    )
    shards = order or range(NUM_SHARDS)
    return sorted(
        (worker(ShardJob(f"{i:05d}", "f", {"curate": "a"})) for i in shards), key=lambda one: one.name
    )


def read(root: Path, sidecars: list[Sidecar], to: str = "captions") -> dict[str, dict[str, str]]:
    return {
        key: {name: data.decode() for name, data in members.items()}
        for one in sidecars
        for key, members in read_samples(Folder.at(root / to), one.file, one)
    }


def test_a_field_of_the_json_becomes_a_column(root):
    columns = {"long": CaptionConfig(field="long", max_chars=20)}
    sidecars = run(root, columns)
    found = read(root, sidecars)
    assert list(found) == KEYS, "every key, in order, also of samples that lack the caption"
    reasons = {1: "no_field", 2: "not_text", 3: "empty", 5: "too_long", 6: "no_field"}
    for index, members in enumerate(found.values()):
        if index in reasons:
            assert members == {"missing.json": f'{{"long":"{reasons[index]}"}}'}
        else:
            assert members == {"long.txt": f"long {index}"}
    assert [(one.samples, one.drops, list(one.files)) for one in sidecars] == [
        (4, {}, ["00000.missing.parquet"]),
        (4, {}, ["00001.missing.parquet"]),
        (4, {}, []),
    ]
    listed = pq.read_table(root / "captions" / "00001.missing.parquet").to_pylist()
    assert listed == [
        {"key": KEYS[5], "caption": "long", "reason": "too_long"},
        {"key": KEYS[6], "caption": "long", "reason": "no_field"},
    ]


def test_the_coverage_of_all_shards_is_counted(root):
    columns = {
        "long": CaptionConfig(field="long"),
        "url": CaptionConfig(field="url"),
    }
    shards = ShardTable.of(run(root, columns))
    folder = Folder.at(root / "captions")
    assert count_coverage(CaptionsConfig(captions=columns), folder, shards) == ["coverage.json"]
    assert json.loads(folder.read("coverage.json")) == {
        "samples": 12,
        "columns": {
            "long": {"present": 8, "missing": {"empty": 1, "no_field": 2, "not_text": 1}},
            "url": {"present": 11, "missing": {"no_field": 1}},
        },
    }


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_table_is_joined_by_our_key(root, group, is_sorted):
    order = range(14) if is_sorted else np.random.default_rng(0).permutation(14)
    names = [*KEYS, "000000099", "000000100"]
    table = write_table(
        root / "t.parquet", [names[i] for i in order], [f"of {names[i]}" for i in order], group,
        nested=[{"a": 1, "b": 2}] * 14,
    )  # fmt: skip
    found = read(root, run(root, {"other": CaptionConfig(table=table)}))
    assert found == {key: {"other.txt": f"of {key}"} for key in KEYS}


def test_a_table_is_joined_by_a_field_of_the_json(root):
    (root / "tables").mkdir()
    write_table(root / "tables" / "b.parquet", ["u0", "u9", "u3"], ["late", "nine", None])
    write_table(root / "tables" / "a.parquet", ["u0", "u1", "u0"], ["first", "", "second"])
    column = CaptionConfig(table=str(root / "tables"), join_field="url")
    found = read(root, run(root, {"other": column}))
    assert found[KEYS[0]] == {"other.txt": "first"} and found[KEYS[9]] == {"other.txt": "nine"}
    assert [found[KEYS[i]]["missing.json"] for i in (1, 3, 2, 6)] == [
        '{"other":"empty"}',
        '{"other":"empty"}',
        '{"other":"no_row"}',
        '{"other":"no_join_field"}',
    ]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.int16()])
def test_keys_may_be_numbers(root, kind):
    keys = pa.array([104, 100, 111, 7], kind)
    table = write_table(root / "t.parquet", keys, ["four", "zero", "eleven", "seven"], 2)
    by_number = read(root, run(root, {"x": CaptionConfig(table=table, join_field="number")}))
    assert [by_number[KEYS[i]].get("x.txt") for i in (0, 4, 11, 7)] == ["zero", "four", "eleven", None]
    by_text = read(root, run(root, {"x": CaptionConfig(table=table, join_field="url")}, "b"), "b")
    assert not any("x.txt" in members for members in by_text.values())


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz", "t.jsonl", "t.json"])
@pytest.mark.parametrize("join", ["key", "number"])
def test_tables_of_other_formats(root, name, join):
    values = KEYS[::2] if join == "key" else list(range(100, 112, 2))
    rows = [{"id": value, "text": f"of {value}"} for value in values]
    lines = ["id\ttext", *(f"{row['id']}\t{row['text']}" for row in rows)]
    text = "\n".join(lines) if "sv" in name else "\n".join(map(json.dumps, rows))
    data = text.replace("\t", ",").encode() if ".csv" in name else text.encode()
    (root / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    column = CaptionConfig(
        table=str(root / name), key_column="id", caption_column="text",
        join_field=None if join == "key" else "number",
    )  # fmt: skip
    found = read(root, run(root, {"x": column}))
    lacking = {6} if join == "number" else set()
    assert [i for i, members in enumerate(found.values()) if "x.txt" in members] == sorted(
        set(range(0, 12, 2)) - lacking
    )
    assert found[KEYS[4]]["x.txt"] == f"of {values[2]}"


def test_one_of_several_captions(root):
    """Items of a list, or lines of a text, in a field of the json or in a table."""
    captions = [["a", "b", "c"], ["a"], [], None, ["a", ""], ["nul \0"]]
    pq.write_table(pa.table({"key": KEYS[:6], "caption": captions}), root / "t.parquet")
    write_table(root / "lines.parquet", KEYS[:2], ["one\r\n\n two ", "one"])
    columns = {
        "first": CaptionConfig(table=str(root / "t.parquet"), item=0),
        "second": CaptionConfig(table=str(root / "t.parquet"), item=1),
        "line": CaptionConfig(table=str(root / "lines.parquet"), item=1),
        "url": CaptionConfig(field="url", item=0),
    }
    found = list(read(root, run(root, columns)).values())
    assert found[0] == {"first.txt": "a", "line.txt": "two", "second.txt": "b", "url.txt": "u0"}
    reasons = [json.loads(members.get("missing.json", "{}")) for members in found]
    assert [one.get("first") for one in reasons[:7]] == [
        None, None, "no_item", "empty", None, "undecodable_caption", "no_row",
    ]  # fmt: skip
    assert reasons[1] == {"second": "no_item", "line": "no_item"}
    with pytest.raises(ValueError, match=r"column 'caption' .* is list.*set captions\.x\.item"):
        run(root, {"x": CaptionConfig(table=str(root / "t.parquet"))})


def test_training_draws_one_of_the_lines_at_each_visit(root):
    """Exactly and reproducibly, each alike, by configuration alone."""
    from collections import Counter

    from repfusion.data.dataset import ColumnDataset
    from repfusion.data.recipe import draw_caption

    every = {0: ["a", "b", "c", "d"], 1: ["a", "b"], 2: ["a"]}
    for shard in range(NUM_SHARDS):
        with ShardCommit(Folder.at(root / "curate"), f"{shard:05d}", "f", {}) as commit:
            with tar_shard(commit) as samples:
                texts = every[shard]
                record = json.dumps({"all_captions": texts}).encode()
                samples.write(KEYS[shard], {"png": b"x", "txt": texts[0].encode(), "json": record})
            commit.commit(f"{shard:05d}.tar")
    names = ("second", "third")
    run(root, {name: CaptionConfig(field="all_captions", item=item) for item, name in enumerate(names, 1)})
    weights = {"txt": 1.0, **{f"{name}.txt": 1.0 for name in names}}
    dataset = ColumnDataset(root / "curate", {"captions": root / "captions"}, {}, caption_weights=weights)
    for sample, texts in enumerate((["a", "b", "c"], ["a", "b"], ["a"])):
        drawn = [draw_caption(dataset[sample].captions, weights, seed)[1] for seed in range(3000)]
        assert drawn == [draw_caption(dataset[sample].captions, weights, seed)[1] for seed in range(3000)]
        shares = {text: count / 3000 for text, count in Counter(drawn).items()}
        assert shares == pytest.approx({text: 1 / len(texts) for text in texts}, abs=0.03)


def test_shards_and_table_in_a_bucket(root, s3_folder):
    expected = run(root, {"x": CaptionConfig(table=write_table(root / "t.parquet", KEYS, KEYS, 2))})
    s3_folder.write("t.parquet", (root / "t.parquet").read_bytes())
    source = s3_folder / "curate"
    for path in (root / "curate").iterdir():
        source.write(path.name, path.read_bytes())
    column = CaptionConfig(table=f"{s3_folder.url}/t.parquet", options=dict(s3_folder.options))
    config = CaptionsConfig(captions={"x": column})
    worker = CaptionsWorker(s3_folder / "captions", source, config)
    made = [worker(ShardJob(one.name, "f", {"curate": "a"})) for one in expected]
    assert [one.sha256 for one in made] == [one.sha256 for one in expected]


def test_only_row_groups_that_can_hold_a_key_are_read(root, monkeypatch):
    table = write_table(root / "t.parquet", KEYS, KEYS, SHARD_SIZE)
    read_groups = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, *args, row_groups, **kwargs):
        read_groups.append(list(row_groups))
        return original(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    run(root, {"x": CaptionConfig(table=table)})
    assert read_groups == [[0], [1], [2]]


def test_the_same_bytes_in_any_order(root):
    table = write_table(root / "t.parquet", KEYS[::2], KEYS[::2])
    columns = {"b": CaptionConfig(table=table), "a": CaptionConfig(field="long")}
    first = run(root, columns)
    again = run(root, dict(reversed(columns.items())), "again", [2, 0, 1])
    assert [one.sha256 for one in first] == [one.sha256 for one in again]
    assert [one.files for one in first] == [one.files for one in again]


def test_the_loader_draws_them(root):
    from tiny_training import npy, write_tar

    from repfusion.data.dataset import ColumnDataset
    from repfusion.data.readers import SampleArray

    run(root, {"long": CaptionConfig(field="long")})
    for shard in range(NUM_SHARDS):
        keys = KEYS[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
        array = npy(np.zeros((2, 4), np.float16))
        samples = [(key, {"image_features.npy": array}) for key in keys]
        write_tar(root / "image_features" / f"{shard:05d}.tar", samples)
    columns = {name: root / name for name in ("image_features", "captions")}
    readers = {"image_features": SampleArray()}
    weights = {"txt": 1.0, "long.txt": 1.0}
    dataset = ColumnDataset(root / "curate", columns, readers, caption_weights=weights)
    assert dataset[0].captions == {"long.txt": ("long 0",), "txt": ("main",)}
    assert dataset[1].captions == {"txt": ("main",)}
    with pytest.raises(ValueError, match=r"has a member 'lnog\.txt'.*\['long\.txt'\]"):
        ColumnDataset(root / "curate", columns, readers, caption_weights={"txt": 1.0, "lnog.txt": 1.0})


def test_what_decides_the_bytes(root):
    table = write_table(root / "t.parquet", KEYS, KEYS)

    def fields(identity: str = "a", **changes):
        columns = {"x": CaptionConfig(table=table, **changes), "y": CaptionConfig(field="long")}
        return fingerprint_fields(
            "captions", CaptionsConfig(captions=columns), lambda url, options: identity + Path(url).name
        )

    base = fields()
    assert base["columns.captions.captions.y.field"] == "long" and fields(options={"a": 1}) == base
    changed = [fields("b"), fields(join_field="url"), fields(max_chars=3)]
    assert [[key for key in base if base[key] != other[key]] for other in changed] == [
        ["columns.captions.captions.x.table"],
        ["columns.captions.captions.x.join_field"],
        ["columns.captions.captions.x.max_chars"],
    ]
    with pytest.raises(ValueError, match=r"captions\n.*at least 1"):
        CaptionsConfig(captions={})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either field .* or table"),
        ({"field": "long", "table": "t.parquet"}, "give either field .* or table"),
        ({"field": "long", "join_field": "url"}, r"\['join_field'\] belong to a table"),
    ],
)
def test_columns_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        CaptionConfig(**fields)


@pytest.mark.parametrize("name", ["long.txt", "", "a b"])
def test_names_that_cannot_be_members(name):
    with pytest.raises(ValueError, match="expected letters, digits"):
        CaptionsConfig(captions={name: CaptionConfig(field="long")})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"key_column": "id"},
            r"captions\.x\.table: .*t\.parquet has no column 'id' .*; it has \['key', 'caption'\]",
        ),
        ({"caption_column": "key", "key_column": "caption"}, None),
        ({"table": "nowhere.parquet"}, r"captions\.x\.table: nowhere\.parquet leads to no file"),
        ({"table": "bad.parquet"}, r"bad\.parquet is not readable as parquet"),
        ({"table": "floats.parquet"}, r"column 'key' .* is double; expected text or whole numbers"),
    ],
)
def test_tables_that_do_not_fit(root, monkeypatch, column, message):
    monkeypatch.chdir(root)
    write_table(root / "t.parquet", KEYS, KEYS)
    (root / "bad.parquet").write_bytes(b"junk" * 9)
    write_table(root / "floats.parquet", [1.5], ["x"])
    columns = {"x": CaptionConfig(**{"table": "t.parquet", **column})}
    if message is None:
        assert len(run(root, columns)) == NUM_SHARDS
        return
    with pytest.raises(ValueError, match=message):
        run(root, columns)


def test_a_broken_json_names_the_sample(root):
    with ShardCommit(Folder.at(root / "curate"), "00000", "f", {}) as commit:
        with tar_shard(commit) as samples:
            samples.write(KEYS[0], {"txt": b"x", "json": b"{"})
        commit.commit("00000.tar")
    with pytest.raises(ShardError, match=r"curate/00000\.tar, key 000000000: its json is broken"):
        run(root, {"long": CaptionConfig(field="long")})


def test_the_module_starts_fast():
    import subprocess
    import sys

    modules = "stages.captions", "stages.prompt_features", "sources.tars", "sources.folder", "sources.parquet"
    code = (
        "import sys\n"
        + "".join(f"import pipelines.{name}\n" for name in modules)
        + "print({'torch', 'ray', 'pyarrow', 'img2dataset', 'transformers', 'fsspec'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_caption_of_too_many_tokens_counts_as_lacking(root):
    """By the tokenizers of the language models that read it; another caption has limits of its own."""
    columns = {name: CaptionConfig(field="long") for name in ("long", "free")}
    limits = {"long": (CaptionLimit(WEIGHTS / "llava", 6),)}
    worker = CaptionsWorker(
        Folder.at(root / "captions"), Folder.at(root / "curate"), CaptionsConfig(captions=columns), limits
    )
    found = read(root, [worker(ShardJob("00001", "f", {"curate": "a"}))])
    assert json.loads(found[KEYS[5]]["missing.json"]) == {"long": "too_many_tokens"}
    assert found[KEYS[5]]["free.txt"] == "x" * 50
    assert found[KEYS[4]] == {"long.txt": "long 4", "free.txt": "long 4"}
    with_limits = fingerprint_fields(
        "c", CaptionsConfig(captions=columns), str, {"long": {"ab": limits["long"][0]}}
    )
    assert with_limits["columns.c.captions.long.max_tokens"] == {"ab": 6}
    assert with_limits["columns.c.captions.free.max_tokens"] == {}
