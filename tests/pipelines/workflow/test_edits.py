"""Editing samples through a workflow: made, judged, planned, verified, and told where they come from."""

import pytest
from running import found, manifests, run_all

from pipelines.build import data_stages, probe_stages, source_entries
from pipelines.shards.tars import read_samples
from pipelines.workflow.plan import plan
from pipelines.workflow.verify import verify

pytestmark = pytest.mark.ray
DEFECTS = {"missing_source": 2, "undecodable_source": 1, "empty_caption": 1}


def test_triples_are_planned_made_and_mended_whole(pool, make_config):
    source = {"kind": "edits", "shard_size": 60, "num_samples": 240, "defects": DEFECTS}
    config = make_config(source=source, last_stage="curate", ingest={"image_size": 32})
    plans = {
        one.name: one
        for one in plan(data_stages(config), lambda: source_entries(config), probe_stages(config))
    }
    results, _ = run_all(config, pool)
    made = manifests(results)
    assert list(made) == ["ingest", "judge", "curate"]
    assert made["ingest"].drops == {"broken_source": 1, "missing_source": 2}
    assert made["curate"].drops.get("empty_caption") == 1
    for name in ("ingest", "curate"):
        assert plans[name].bytes == pytest.approx(made[name].bytes, rel=0.1), name
    assert made["curate"].lineage["ingest"]["source.kind"] == "edits"
    assert made["curate"].lineage["ingest"]["source.kinds.remove"] == 1.0

    folder = config.data_folder / "curate"
    before = {name: folder.read(name) for name in folder.names() if name.endswith(".tar")}
    for name in before:
        for _, members in read_samples(folder, name):
            assert members.keys() == {"png", "txt", "json", "source.png"}
    path = config.root / "ingest" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b".source.png") + 700] ^= 1  # within a source picture
    path.write_bytes(bytes(data))
    broken = verify(data_stages(config), config.root, config.ray, True, lambda line: None, pool)
    assert [f"{one.stage}/{one.name}" for one in broken] == ["ingest/00001"]
    assert {name: folder.read(name) for name in before} == before


def test_another_wording_makes_the_triples_stale_with_the_reason(pool, make_config):
    source = {"kind": "edits", "shard_size": 10, "num_samples": 20}
    config = make_config(source=source, last_stage="curate")
    run_all(config, pool)
    other = make_config(source={**source, "wording": "plain"}, last_stage="curate")
    state = found(other)["ingest"]
    assert state.status == "stale" and "source.wording varied -> plain" in state.reason
