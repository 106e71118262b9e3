"""What `status` says of every kind of change and damage, and that a run then does that and no more."""

import json
import re
from pathlib import Path

import pytest
from running import DATA_STAGES, data_files, found, ran, run_all, shard_times, start_training, statuses

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.shards.store import SCHEMA
from pipelines.workflow.inspection import STAGE

pytestmark = pytest.mark.ray


def stale(config: WorkflowConfig) -> dict[str, str]:
    """The reason of each stage that is stale; the others have to be fresh."""
    states = found(config)
    assert {state.status for state in states.values()} <= {"fresh", "stale"}
    return {name: state.reason for name, state in states.items() if state.status == "stale"}


@pytest.mark.parametrize(
    ("sections", "first", "reason"),
    [
        ({"source": {"seed": 5}}, "source", "source.seed 0 -> 5"),
        ({"source": {"shard_size": 20}}, "source", "source.shard_size 10 -> 20"),
        ({"ingest": {"quality": 1}}, "ingest", "ingest.quality 6 -> 1"),
        ({"ingest": {"resize": "border"}}, "ingest", "ingest.resize center_crop -> border"),
        ({"curate": {"max_aspect": 2.0}}, "judge", "curate.max_aspect null -> 2.0"),
        ({"curate": {"duplicates": "keep"}}, "judge", "curate.duplicates exact -> keep"),
        (
            {"ingest": {"encode": "webp", "quality": 80}},
            "ingest",
            "ingest.encode png -> webp, ingest.quality 6 -> 80",
        ),
    ],
)
def test_a_changed_field_makes_its_stage_and_all_below_stale(
    complete_run, configure, sections, first, reason
):
    below = DATA_STAGES[DATA_STAGES.index(first) :]
    assert stale(configure(complete_run.root, **sections)) == dict.fromkeys(below, reason)


@pytest.mark.parametrize(
    ("model", "stage", "reason"),
    [
        ({"encoder": {"layer": -1}}, "image_features", "columns.image_features.encoder.layer -2 -> -1"),
        (
            {"encoder": {"image_size": 24}},
            "image_features",
            "columns.image_features.encoder.image_size 32 -> 24",
        ),
        (
            {"mllm_dtype": "bfloat16"},
            "prompt_features",
            "columns.prompt_features.mllm_dtype float32 -> bfloat16",
        ),
    ],
)
def test_a_column_does_not_follow_what_the_other_is_made_by(complete_run, configure, model, stage, reason):
    assert stale(configure(complete_run.root, trainings={"train": {"model": model}})) == {stage: reason}


def test_what_changes_no_bytes_makes_nothing_stale(complete_run, configure):
    actors = {"num_actors": 3, "num_cpus": 0.5, "deadline_sec": 99, "max_attempts": 7, "backoff_sec": 0}
    config = configure(
        complete_run.root,
        source={"actors": actors, "port": 5555},
        ingest={"actors": actors, "num_threads": 3, "timeout_sec": 7, "retries": 4, "max_drop_fraction": 0.9},
        curate={"actors": actors, "max_drop_fraction": 0.9},
        columns={
            "image_features": {"actors": actors, "batch_size": 5},
            "prompt_features": {"actors": actors, "batch_size": 5},
        },
        trainings={"train": {"num_steps": 9, "engine": {"lr": 0.5}, "model": {"dit": {"depth": 1}}}},
        ray={"num_cpus": 1},
        evaluate={"suites": {"scenes": {"num_prompts": 12}}},
    )
    assert stale(config) == {}


def test_a_stage_of_another_schema_says_so(run_copy):
    path = run_copy.root / "image_features" / STAGE
    asked = json.loads(path.read_bytes())
    path.write_text(json.dumps({**asked, "schema": SCHEMA - 1, "fingerprint": "f"}))
    assert stale(run_copy) == {"image_features": f"written by schema {SCHEMA - 1}, this is {SCHEMA}"}


def test_nothing_run_is_missing(make_config):
    states = found(make_config())
    assert {(state.status, state.reason) for state in states.values()} == {("missing", "not run yet")}
    assert states["image_features"].todo is None


def damage(root: Path, stage: str, name: str, kind: str) -> None:
    path = root / stage / name
    match kind:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "garbage":
            path.write_bytes(b"\0" * path.stat().st_size)
        case "empty":
            path.write_bytes(b"{}")


@pytest.mark.parametrize(
    ("stage", "name", "kind", "reason"),
    [
        ("source", "00001.parquet", "gone", "1 of 4 shards to do: 00001.parquet missing or of another size"),
        ("source", "00001.images.tar", "cut", "1 of 4 shards to do: 00001.images.tar missing or of"),
        ("ingest", "00002.tar", "cut", "1 of 4 shards to do: 00002.tar missing or of another size"),
        ("judge", "duplicates.parquet", "gone", "duplicates.parquet missing or of another size"),
        ("image_features", "00003.json", "gone", "1 of 4 shards to do: 00003 missing"),
        (
            "image_features",
            "statistics.safetensors",
            "cut",
            "statistics.safetensors missing or of another size",
        ),
        ("image_features", "manifest.json", "gone", "all shards complete, the manifest is not written"),
        ("image_features", "manifest.json", "garbage", "all shards complete, the manifest is not written"),
        ("prompt_features", "shards.parquet", "gone", "all shards complete, the manifest is not written"),
        ("prompt_features", "shards.parquet", "garbage", "all shards complete, the manifest is not written"),
    ],
)
def test_damage_makes_a_stage_partial(run_copy, stage, name, kind, reason):
    damage(run_copy.root, stage, name, kind)
    states = found(run_copy)
    assert states[stage].status == "partial" and states[stage].reason.startswith(reason)
    above = DATA_STAGES[: DATA_STAGES.index(stage)]
    assert all(states[one].status == "fresh" for one in above)
    for one in build_stages(run_copy):
        if stage in {upstream.name for upstream in one.upstream}:
            reason = states[one.name].reason
            assert stage in reason and re.search(r"above (is|are) not complete$", reason)


@pytest.mark.parametrize("kind", ["gone", "garbage", "empty"])
def test_a_stage_that_does_not_know_what_it_is_counts_as_missing(run_copy, kind):
    damage(run_copy.root, "prompt_features", STAGE, kind)
    assert found(run_copy)["prompt_features"].status == "missing"


def test_a_run_after_damage_makes_what_is_gone_and_nothing_else(run_copy, pool):
    expected, before = data_files(run_copy.data_folder), shard_times(run_copy.root)
    for stage, name, kind in [
        ("source", "00001.images.tar", "gone"),
        ("curate", "00002.tar", "cut"),
        ("judge", "duplicates.parquet", "cut"),
        ("image_features", "00003.statistics.safetensors", "gone"),
        ("prompt_features", "00000.json", "gone"),
        ("prompt_features", "shards.parquet", "garbage"),
    ]:
        damage(run_copy.root, stage, name, kind)
    results, _ = run_all(run_copy, pool)
    assert ran(results) == ["source", "judge", "curate", "image_features", "prompt_features"]
    assert data_files(run_copy.data_folder) == expected
    after = shard_times(run_copy.root)
    again = {name.partition(".")[0] for name in after if after[name] != before[name]}
    assert again == {
        "source/00001",
        "judge/duplicates",
        "curate/00002",
        "image_features/00003",
        "image_features/statistics",
        "prompt_features/00000",
    }
    assert set(statuses(run_copy).values()) == {"fresh"}


@pytest.mark.slow
def test_another_image_size_of_the_encoder_makes_the_image_features_alone_anew(make_config, pool):
    def sections(size: int) -> dict:
        return {
            "source": {"num_samples": 20},
            "ingest": {"image_size": 64},
            "trainings": {"train": {"model": {"encoder": {"image_size": size}}}},
        }

    small, large = make_config(**sections(32)), make_config(**sections(64))
    run_all(small, pool)
    start_training(build_stages(make_config(**sections(32), last_stage="train"))[-1])
    states = found(make_config(**sections(64), last_stage="train"))
    reason = "columns.image_features.encoder.image_size 32 -> 64"
    for name, state in states.items():
        expected = ("stale", reason) if name == "image_features" else ("fresh", "")
        if name == "train":
            expected = "stale", f"{reason}, trainings.train.model.encoder.image_size 32 -> 64"
        assert (state.status, state.reason) == expected, name
    before = shard_times(small.root)
    results, said = run_all(large, pool)
    assert ran(results) == ["image_features"] and f"image_features: stale: {reason}" in said
    after = shard_times(small.root)
    again = {name for name in after if after[name] != before[name]}
    assert again == {name for name in after if name.startswith("image_features/")}


@pytest.mark.slow
def test_fewer_shards_leave_none_of_the_old_ones(run_copy, configure, make_config, pool):
    larger = {"source": {"shard_size": 20}}
    fewer, anew = configure(run_copy.root, **larger), make_config("anew", **larger)
    run_all(fewer, pool)
    run_all(anew, pool)
    assert data_files(fewer.data_folder) == data_files(anew.data_folder)
    assert not list(fewer.root.glob("*/0000[23]*"))
    assert set(statuses(fewer).values()) == {"fresh"}
