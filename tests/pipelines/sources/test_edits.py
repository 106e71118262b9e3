"""Edits as samples: what they hold, what decides them, and what becomes of those that are spoilt."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources.edits import EditDefectsConfig, EditsConfig, EditsSource, EditWorker, jobs
from pipelines.sources.ingest import IngestConfig
from repfusion.scenes.edits import EDIT_KINDS
from repfusion.scenes.world import Scene, Thing, is_held_out, render, to_uint8

INGEST = IngestConfig(max_drop_fraction=1)
DEFECTS = EditDefectsConfig(missing_source=2, undecodable_source=1, missing=1, undecodable=1, empty_caption=1)


def run(config: EditsConfig, to: Path, reverse: bool = False) -> list[Sidecar]:
    worker = EditWorker(Folder.at(to), config, INGEST)
    listed = jobs(config)
    return sorted(
        (worker(job) for job in (reversed(listed) if reverse else listed)), key=lambda one: one.name
    )


def read(to: Path, sidecars: list[Sidecar]) -> dict[str, dict[str, bytes]]:
    return {key: members for one in sidecars for key, members in read_samples(Folder.at(to), one.file, one)}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def scene(facts: dict) -> Scene:
    return Scene(tuple(Thing(**thing) for thing in facts["things"]), facts["relation"])


def test_a_sample_holds_both_scenes_and_the_instruction_and_no_picture_what_is_held_out(tmp_path):
    config = EditsConfig(num_samples=60, shard_size=25)
    sidecars = run(config, tmp_path)
    assert [one.samples for one in sidecars] == [25, 25, 10]
    found = read(tmp_path, sidecars)
    for members in found.values():
        assert members.keys() == {"png", "txt", "json", "source.png"} and members["txt"]
        facts = json.loads(members["json"])["edit"]
        for extension, side in {"source.png": "source", "png": "target"}.items():
            shown = scene(facts[side])
            assert np.array_equal(pixels(members[extension]), to_uint8(render(shown, config.world)))
            assert not is_held_out(shown)
    assert {json.loads(one["json"])["edit"]["kind"] for one in found.values()} == set(EDIT_KINDS)


def test_the_same_bytes_whatever_the_order_and_the_shards(tmp_path):
    config = EditsConfig(num_samples=20, shard_size=7)
    one = read(tmp_path / "one", run(config, tmp_path / "one"))
    whole = config.model_copy(update={"shard_size": 20})
    assert list(one) == [f"{i:09d}" for i in range(20)]
    assert read(tmp_path / "two", run(config, tmp_path / "two", reverse=True)) == one
    assert read(tmp_path / "three", run(whole, tmp_path / "three")) == one
    digests = [[one.sha256 for one in run(config, tmp_path / name)] for name in ("one", "two")]
    assert digests[0] == digests[1]
    other = config.model_copy(update={"seed": 1})
    assert read(tmp_path / "four", run(other, tmp_path / "four")) != one


def test_kinds_come_by_their_weights_and_plain_words_are_the_first_ones(tmp_path):
    config = EditsConfig(num_samples=90, kinds={"remove": 2, "recolour": 1}, wording="plain")
    found = read(tmp_path, run(config, tmp_path))
    kinds = Counter(json.loads(one["json"])["edit"]["kind"] for one in found.values())
    assert set(kinds) == {"remove", "recolour"} and 45 < kinds["remove"] < 75
    assert {one["txt"].split()[0] for one in found.values()} == {b"make", b"remove"}


def test_spoilt_samples_are_counted_by_what_was_done_to_them(tmp_path):
    config = EditsConfig(num_samples=30, defects=DEFECTS)
    (sidecar,) = run(config, tmp_path)
    expected = {"missing_source": 2, "broken_source": 1, "no_image": 1, "undecodable_image": 1}
    assert sidecar.drops == expected and sidecar.samples == 25
    dropped = pq.read_table(tmp_path / "00000.drops.parquet")["key"].to_pylist()
    found = read(tmp_path, [sidecar])
    assert not found.keys() & set(dropped) and len(found) + len(dropped) == 30
    assert sum(members["txt"] == b"" for members in found.values()) == 1  # for curate to count
    sound = read(tmp_path / "sound", run(EditsConfig(num_samples=30), tmp_path / "sound"))
    assert all(members["png"] == sound[key]["png"] for key, members in found.items())


def test_more_defects_than_samples_are_an_error():
    with pytest.raises(ValueError, match="3 defects in 2 samples"):
        jobs(EditsConfig(num_samples=2, defects=EditDefectsConfig(missing_source=3)))


@pytest.mark.parametrize("kinds", [{}, {"move": 0}, {"move": -1, "add": 1}, {"move": float("nan")}])
def test_kinds_need_a_weight(kinds):
    with pytest.raises(ValueError, match=r"expected weights that are 0 or more|finite number"):
        EditsConfig(kinds=kinds)


def test_a_probe_takes_samples_that_are_spread_evenly(tmp_path):
    config = EditsConfig(num_samples=100, shard_size=30)
    entries = EditsSource(config).entries()
    assert (entries.num_entries, list(entries.shard_names)) == (100, ["00000", "00001", "00002", "00003"])
    (job,) = entries.probe(10, 0)
    sidecar = EditWorker(Folder.at(tmp_path), config, INGEST)(ShardJob("probe", "", {}, job.arguments))
    assert list(read(tmp_path, [sidecar])) == [f"{i:09d}" for i in range(0, 100, 10)]
