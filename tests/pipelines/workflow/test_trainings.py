"""Several trainings and columns in one workflow: which reads what, what goes on from what, and what a change
or a kill costs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import end_tagged, run_command, tagged_process
from running import found, run_all, until

from pipelines.build import build_stages, data_stages
from pipelines.commands import print_plan
from pipelines.config import WorkflowConfig
from pipelines.dag import Place, WholeStage
from pipelines.runtime.pool import ActorPool
from pipelines.shards.digests import Digests
from pipelines.shards.storage import Folder
from pipelines.stages.train import remote_copies, started_from
from pipelines.workflow.collect import find_garbage
from pipelines.workflow.verify import verify
from repfusion.config import ConfigError, to_yaml, validate
from repfusion.files import canonical_json
from repfusion.lineage.trace import trace
from repfusion.runs.folder import complete_checkpoints
from repfusion.tracking import metric_history

ENGINE = {"precision": "fp32", "micro_batch_size": 8, "num_threads": 1, "warmup_steps": 1}
SHORT = {
    "engine": ENGINE,
    "global_batch_size": 8,
    "num_steps": 2,
    "checkpoint_every_steps": 1,
    "log_every_steps": 1,
    "num_workers": 1,
}


@pytest.fixture(scope="session")
def two_trainings(configure, models) -> Callable[..., WorkflowConfig]:
    """`complete_run`'s data and two trainings of two steps, `second` from `first`'s last checkpoint; `first`
    and `second` are further fields of theirs, `sections` other ones.
    """
    model = {
        "encoder": {"path": models["tower"]},
        "mllm": models["llava"],
        "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2},
        "decoder": models["decoder"],
    }

    def make(root: Path, first: dict = {}, second: dict = {}, **sections: Any) -> WorkflowConfig:  # noqa: B006
        values = configure(root).model_dump(mode="json", exclude={"columns", "trainings"})
        trainings = {
            "first": {"model": model, **SHORT, **first},
            "second": {"init_from": "stage:first", **SHORT, **second},
        }
        return validate(
            WorkflowConfig, {**values, "last_stage": "second", "trainings": trainings, **sections}
        )

    return make


def make_stage(config: WorkflowConfig, name: str) -> WholeStage:
    stage = {stage.name: stage for stage in build_stages(config)}[name]
    assert isinstance(stage, WholeStage)
    return stage


def test_a_training_goes_on_from_another(two_trainings, tmp_path: Path):
    """Nothing of it exists yet: plan and status work on an empty root."""
    config = two_trainings(tmp_path / "run")
    states = found(config)
    assert list(states) == ["source", "ingest", "judge", "curate", "image_features", "first", "second"]
    assert {state.reason for state in states.values()} == {"not run yet"}
    print_plan(config, 8, [])
    assert config.training("second").model == config.training("first").model
    assert [one.name for one in make_stage(config, "second").upstream] == [
        "curate",
        "image_features",
        "first",
    ]
    assert make_stage(config, "second").fields["trainings.second.init_from"] == "stage:first"
    other = two_trainings(tmp_path / "run", first={"seed": 5})
    assert make_stage(other, "second").fingerprint != make_stage(config, "second").fingerprint
    deeper = {"model": {"dit": {"depth": 1}}}
    assert two_trainings(tmp_path, second=deeper).training("second").model.dit.hidden_size == 32


def test_a_training_takes_over_the_lora_of_the_one_before_or_is_refused(two_trainings, tmp_path: Path):
    """Before anything runs: at the second training's start the first would have run in vain."""
    model = two_trainings(tmp_path).training("first").model.model_dump(mode="json")
    model["conditioning"] = {"method": "query_kontext", "num_queries": 3, "lora": {"rank": 2}}
    second = two_trainings(tmp_path, {"model": model}, {"model": {"conditioning": {"replaces_dit": True}}})
    assert second.training("second").model.conditioning.model_dump()["lora"]["rank"] == 2
    for lora, said in (({"rank": 4}, "'rank': 4"), (None, "none")):
        own = {"model": {"conditioning": {"replaces_dit": True, "lora": lora}}}
        expected = (
            rf"second\.init_from: conditioning\.lora is .*{said}.*, that of the training before .*'rank': 2"
        )
        with pytest.raises(ConfigError, match=expected):
            two_trainings(tmp_path, {"model": model}, own)


def test_trainings_stand_in_the_order_in_which_they_need_each_other(two_trainings, tmp_path: Path):
    config = two_trainings(tmp_path)
    reverse = dict(reversed(config.model_dump(mode="json")["trainings"].items()))
    turned = validate(WorkflowConfig, {**config.model_dump(mode="json"), "trainings": reverse})
    assert list(turned.trainings) == ["second", "first"]
    assert [stage.name for stage in build_stages(turned)][-2:] == ["first", "second"]


@pytest.mark.parametrize(
    ("first", "second", "sections", "message"),
    [
        ({}, {"init_from": "stage:frist"}, {}, r"second.init_from: stage:frist names no .* first, second"),
        ({"init_from": "stage:second"}, {}, {}, r"trainings: .*go on from each other"),
        ({}, {}, {"evaluate": {"training": "third"}}, r"evaluate.training is 'third'; expected one of first"),
        ({}, {}, {"columns": {"first": {"kind": "image_features"}}}, "first: a column and a training"),
        ({}, {}, {"columns": {"judge": {"kind": "image_features"}}}, "'judge' cannot name a column"),
        (
            {},
            {},
            {"columns": {"image_features": {}, "b": {"kind": "image_features"}}},
            "b: no training reads",
        ),
        (
            {"data": {"columns": {"image_features": "stage:other"}}},
            {},
            {},
            r"first.data.columns.image_features: stage:other is no such column .* one of image_features",
        ),
        ({}, {"num_workers": 3}, {}, r"trainings.second: .*global_batch_size"),
        ({}, {}, {"columns": {"b": {"batch_size": 3}}}, r"columns.b: .*'kind'"),
        ({}, {}, {"trainings": {}}, "trainings: there is none"),
        ({}, {}, {"last_stage": "prompt_features"}, "last_stage is 'prompt_features'; expected .*second"),
    ],
)
def test_what_does_not_fit_is_named(two_trainings, tmp_path: Path, first, second, sections, message):
    with pytest.raises(ConfigError, match=message):
        two_trainings(tmp_path, first, second, **sections)


def test_each_training_reads_the_columns_that_its_model_can_use(two_trainings, tmp_path: Path, models):
    config = two_trainings(tmp_path, second={"model": {"conditioning": "text_embed"}})
    assert config.training("first").data.columns == {"image_features": tmp_path / "image_features"}
    assert config.training("second").data.columns == {
        name: tmp_path / name for name in ("image_features", "prompt_features")
    }
    assert config.readers("prompt_features") == ["second"]
    assert [one.name for one in make_stage(config, "second").upstream] == [
        "curate",
        "image_features",
        "prompt_features",
        "first",
    ]
    # by other folders, it reads others: their data counts, not their place
    elsewhere = {"data": {"columns": {"image_features": tmp_path / "elsewhere"}}}
    config = two_trainings(tmp_path, elsewhere, elsewhere, last_stage="second")
    assert config.made_columns == [] and make_stage(config, "first").upstream[0].name == "curate"
    assert make_stage(config, "first").fields["trainings.first.data.image_features"] is None


def test_a_column_is_made_by_one_model(two_trainings, tmp_path: Path, models):
    own = {"columns": {"large": {"kind": "image_features", "encoder": {"path": str(models["tower"])}}}}
    other = {"encoder": {"path": models["tower"], "layer": -1}}
    with pytest.raises(
        ValueError,
        match=r"trainings\.second\.model\.encoder is .*-1.*'image_features'.*trainings\.first\.model\.enc",
    ):
        build_stages(two_trainings(tmp_path, second={"model": other}))
    with pytest.raises(ValueError, match=r"trainings\.second\.model\.encoder is .*columns\.large\.encoder"):
        build_stages(two_trainings(tmp_path, second={"model": other}, **own))

    columns = {"image_features": {}, "last": {"kind": "image_features"}}
    reads = {"data": {"columns": {"image_features": "stage:last"}}, "model": other}
    config = two_trainings(tmp_path, second=reads, columns=columns)
    stages = {stage.name: stage for stage in build_stages(config)}
    assert stages["image_features"].fields["columns.image_features.encoder.layer"] == -2
    assert stages["last"].fields["columns.last.encoder.layer"] == -1
    assert config.training("second").data.columns == {"image_features": tmp_path / "last"}
    # a further training that reads the same column makes nothing anew
    alone = two_trainings(tmp_path, last_stage="image_features")
    assert build_stages(alone)[-1].fingerprint == stages["image_features"].fingerprint


def test_alternative_captions_are_read_and_encoded(two_trainings, tmp_path: Path):
    captions = {"captions": {"captions": {"long": {"field": "long"}}}}
    config = two_trainings(tmp_path, second={"model": {"conditioning": "text_embed"}}, columns=captions)
    assert config.made_columns == ["captions", "image_features", "prompt_features"]
    stages = {stage.name: stage for stage in build_stages(config)}
    assert [one.name for one in stages["prompt_features"].upstream] == ["curate", "captions"]
    assert stages["prompt_features"].fields["columns.prompt_features.captions"] == ["long"]
    assert "captions" in [one.name for one in stages["first"].upstream]
    assert config.training("first").data.columns["captions"] == tmp_path / "captions"


def test_the_last_training_is_scored_unless_another_is_named(two_trainings, tmp_path: Path):
    last = two_trainings(tmp_path, last_stage="report")
    first = two_trainings(tmp_path, last_stage="report", evaluate={"training": "first"})
    assert [make_stage(one, "evaluate").upstream[0].name for one in (last, first)] == ["second", "first"]


def test_remote_columns_are_copied_for_each_training(two_trainings, tmp_path: Path):
    config = two_trainings(tmp_path, data_url="memory://bucket/data")
    (*_, second) = build_stages(config)
    stages = {stage.name: stage for stage in build_stages(config)}
    place = Place(config.data_folder, config.root, Digests(config.root))
    copies = remote_copies(second.upstream, place)
    assert copies == [
        (stages[name].folder, tmp_path / "columns" / name) for name in ("curate", "image_features")
    ]
    data = config.training("second").data
    assert [data.images, data.columns["image_features"]] == [target for _, target in copies]
    assert remote_copies(second.upstream, Place(Folder.at(tmp_path), tmp_path, place.digests)) == []


@pytest.mark.ray
@pytest.mark.slow
def test_two_trainings_run_are_killed_between_them_and_resumed(
    run_copy, two_trainings, pool: ActorPool, tmp_path: Path
):
    root = run_copy.root
    config, path, log = two_trainings(root), tmp_path / "workflow.yaml", tmp_path / "log"
    path.write_text(to_yaml(config))
    pool.close()  # its idle actors hold the CPUs
    with tagged_process(run_command(path), f"trainings-{tmp_path.name}", log) as process:
        until((root / "second" / "stage.json").exists, process, log)
        process.kill()
        process.wait()
        end_tagged(f"trainings-{tmp_path.name}")
    states = found(config)
    assert states["first"].status == "fresh"
    assert (states["second"].status, states["second"].reason) == ("partial", "started, not complete")
    before = (root / "first" / "train.json").stat().st_mtime_ns

    results, said = run_all(config, pool)
    assert "first: fresh, skipped (done)" in said and not results["second"].skipped
    assert (root / "first" / "train.json").stat().st_mtime_ns == before
    first, second = (complete_checkpoints(root / name / "checkpoints")[-1] for name in ("first", "second"))
    assert json.loads((root / "second" / "config.json").read_text())["init_from"] == str(first)
    assert str(first) in canonical_json([vars(link) for link in trace(second)])
    runs = [json.loads((root / name / "train.json").read_text()) for name in ("first", "second")]
    for one in runs:
        assert [step for step, _ in metric_history(one["tracking_uri"], one["run_id"], "train/loss")] == [
            1,
            2,
        ]
    assert runs[0]["run_id"] != runs[1]["run_id"]
    assert {state.status for state in found(config).values()} == {"fresh"}

    # another seed in the first makes both stale, with the reason; what the first trained stays first's
    changed = found(two_trainings(root, first={"seed": 5}))
    assert [changed[name].status for name in ("image_features", "first", "second")] == [
        "fresh",
        "stale",
        "stale",
    ]
    assert changed["first"].reason == changed["second"].reason == "trainings.first.seed 0 -> 5"
    alone = found(two_trainings(root, second={"seed": 5}))
    assert (alone["first"].status, alone["second"].reason) == ("fresh", "trainings.second.seed 0 -> 5")

    # a certain checkpoint of it, and one that is not there
    certain = config.training("second").model_copy(update={"init_from": Path("stage:first/step_00000001")})
    assert started_from(certain, root / "first").init_from == first.with_name("step_00000001")
    none = certain.model_copy(update={"init_from": Path("stage:first/step_00000009")})
    with pytest.raises(ValueError, match=r"no complete step_00000009; it holds step_00000001, step_00000002"):
        started_from(none, root / "first")

    # what looks after the data leaves the trainings alone, and knows whose they are
    assert verify(data_stages(config), root, config.ray, say=said.append, pool=pool) == []
    garbage = {one.folder.name for one in find_garbage([build_stages(config)], {root})}
    assert garbage == {"prompt_features"}
    less = two_trainings(root, last_stage="first")
    assert {one.folder.name for one in find_garbage([build_stages(less)], {root})} == garbage | {"second"}
