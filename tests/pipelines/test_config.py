"""The workflow's configuration: shipped files parse, overrides apply, mistakes are named."""

import pickle
from pathlib import Path

import pytest
import yaml
from running import start_training

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.sources.scenes import ScenesConfig
from pipelines.sources.urls import UrlsConfig
from pipelines.workflow.inspection import states
from repfusion.config import ConfigError, load_config, to_yaml, validate
from repfusion.data.columns import MANIFEST

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))
FINETUNE = CONFIGS[0].with_name("finetune.yaml")
LATER = {FINETUNE, FINETUNE.with_name("demo_edit.yaml"), FINETUNE.with_name("text_to_video.yaml")}
"""What goes on from a checkpoint of another workflow, or needs weights that are not shipped."""
"""Goes on from what the demo made, which a fresh clone does not hold."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_parse_and_round_trip(path):
    config = load_config(WorkflowConfig, path)
    assert validate(WorkflowConfig, yaml.safe_load(to_yaml(config))) == config
    assert config.ingest.image_size == config.source.world.image_size


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("root: here\ncolumns: {image_features: {batch_size: 8}}\n")
    config = load_config(
        WorkflowConfig,
        path,
        ["columns.image_features.batch_size=16", "source.num_samples=5", "ingest.image_size=null"],
    )
    features = config.columns["image_features"]
    assert (features.batch_size, config.source.num_samples, config.ingest.image_size) == (
        16,
        5,
        None,
    )
    train = config.training("train")
    assert train.output_dir == Path("here/train") and train.data.images == Path("here/curate")


@pytest.mark.parametrize("path", ["x.tar", "*.tar", "[0-9]*.tar", "{000..009}.tar", "a #b.tar", "5", "no"])
def test_overrides_are_text_as_typed(tmp_path, path):
    (tmp_path / "w.yaml").write_text("root: runs/x\nsource: {kind: tars}\n")
    config = load_config(WorkflowConfig, tmp_path / "w.yaml", ["root=runs/lora #1/x", f"source.path={path}"])
    assert (config.root, config.source.path) == (Path("runs/lora #1/x"), path)
    urls = ["root=r", "source.kind=urls", "source.path=x.csv", "source.caption_column=yes", "data_url=null"]
    config = load_config(WorkflowConfig, tmp_path / "w.yaml", urls)
    assert (config.source.caption_column, config.data_url) == ("yes", None)


def test_another_source_takes_the_place_of_the_files(tmp_path):
    """What the file says of scenes is no mistake in a list of addresses."""
    demo = CONFIGS[0].with_name("demo.yaml")
    config = load_config(WorkflowConfig, demo, ["source.kind=urls", "source.path=list.csv"])
    assert config.source == UrlsConfig(path="list.csv")
    same = load_config(WorkflowConfig, demo, ["source.kind=scenes", "source.seed=5"])
    assert (same.source.seed, same.source.num_samples) == (5, 4000)
    assert load_config(WorkflowConfig, demo, ["source=scenes"]).source == ScenesConfig()
    with pytest.raises(ConfigError, match=r"unknown key 'source.num_samples'"):
        load_config(WorkflowConfig, demo, ["source.kind=urls", "source.path=l", "source.num_samples=3"])


def test_another_method_takes_the_place_of_the_files(tmp_path):
    path, place = tmp_path / "w.yaml", "trainings.train.model.conditioning"
    method = {"method": "noisy_latents", "bidirectional": True}
    path.write_text(
        yaml.safe_dump({"root": "r", "trainings": {"train": {"model": {"conditioning": method}}}})
    )
    other = load_config(WorkflowConfig, path, [f"{place}.method=queries"])
    assert other.trainings["train"].model.conditioning.method == "queries"
    same = load_config(WorkflowConfig, path, [f"{place}.method=noisy_latents"])
    assert same.training("train").model.conditioning.model_dump(exclude_defaults=True) == {
        "bidirectional": True
    }


@pytest.mark.parametrize(
    ("values", "images"),
    [
        ({}, "here/curate"),
        ({"data_url": "s3://bucket/x", "storage_options": {"profile": "p"}}, "here/columns/curate"),
        ({"data_url": "file:///data/x"}, "/data/x/curate"),
        ({"data_url": "/data/x/"}, "/data/x/curate"),
        (
            {
                "source": {"kind": "urls", "path": "s3://lists/*.parquet", "extra_columns": ["a"]},
                "ingest": {"encode": "jpg", "quality": 90, "max_requests_per_sec_per_host": 2.5},
                "curate": {"duplicates": "near", "max_aspect": 3.0},
                "trainings": {"train": {"model": {"encoder": {"image_size": 48}}}},
            },
            "here/curate",
        ),
    ],
)
def test_what_is_resolved_loads_as_the_same(tmp_path, values, images):
    config = validate(WorkflowConfig, {"root": "here", **values})
    assert config.training("train").data.images == Path(images)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(WorkflowConfig, path) == config
    assert to_yaml(load_config(WorkflowConfig, path)) == path.read_text()


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in LATER], ids=lambda path: path.name)
def test_shipped_configs_become_stages(path):
    """Models that they name are there, and each stage knows what decides its bytes."""
    config = load_config(WorkflowConfig, path)
    stages = build_stages(config)
    assert [stage.name for stage in stages][-1] == config.last_stage
    assert len({stage.fingerprint for stage in stages}) == len(stages)


def test_finetuning_says_what_has_to_run_before_it(tmp_path):
    """And with a checkpoint and a complete data set where it looks for them, it becomes stages."""
    overrides = [f"root={tmp_path}/finetune", f"trainings.train.init_from={tmp_path}/checkpoint"]
    for column in ("images", "columns.image_features"):
        overrides.append(f"trainings.train.data.mix.demo.{column}={tmp_path}/{column}")
    config = load_config(WorkflowConfig, FINETUNE, overrides)
    with pytest.raises(
        ValueError, match=r"trainings.train.init_from: .*checkpoint is no folder; .*'make demo'"
    ):
        build_stages(config)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(
        ValueError, match=r"trainings.train.data.mix.demo.images: .*run that workflow to its end"
    ):
        build_stages(config)
    for column in ("images", "columns.image_features"):
        (tmp_path / column).mkdir()
        (tmp_path / column / MANIFEST).write_text("{}")
    stages = {stage.name: stage for stage in build_stages(config)}
    assert {"trainings.train.init_from", "trainings.train.data.mix.demo.images"} <= set(
        stages["train"].fields
    )
    assert list(stages)[-1] == "report"


def test_what_follows_from_the_environment_is_text_in_a_stage_and_decides_its_fingerprint(
    tmp_path, monkeypatch
):
    path = tmp_path / "w.yaml"
    path.write_text(
        f"root: {tmp_path}/run\nlast_stage: ingest\nsource: {{num_samples: '${{oc.env:NUM}}'}}\n"
        "trainings: {train: {num_steps: '${oc.env:NUM}', tracking: {uri: '${oc.env:DSN}'}}}\n"
    )
    monkeypatch.setenv("NUM", "8")
    monkeypatch.setenv("DSN", "postgresql://me:Zq7secret@host/db")
    config = load_config(WorkflowConfig, path)
    source, ingest = build_stages(config)
    assert source.fields["source.num_samples"] == 8
    assert (
        source.shown["source.num_samples"]
        == ingest.lineage["source"]["source.num_samples"]
        == "${oc.env:NUM}"
    )
    start_training(source)
    assert states([source])["source"].status == "partial"

    train = config.training("train")
    assert (train.num_steps, train.tracking.uri) == (8, "postgresql://me:Zq7secret@host/db")
    for one in (train, pickle.loads(pickle.dumps(train)), train.model_copy(update={"seed": 1})):
        assert one.as_written()["num_steps"] == "${oc.env:NUM}" and one.tracking_address == "${oc.env:DSN}"

    monkeypatch.setenv("NUM", "16")
    other = build_stages(load_config(WorkflowConfig, path))[0]
    assert other.fingerprint != source.fingerprint and other.shown == source.shown
    state = states([other])["source"]
    assert state.status == "stale" and state.reason.startswith("what ${oc.env:NUM} stands for changed")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "columns.image_features.bath_size=3",
            r"'columns.image_features.bath_size'; did you mean 'columns.image_features.batch_size'\?",
        ),
        ("training.train.num_steps=3", r"unknown key 'training'; did you mean 'trainings'\?"),
        (
            "trainings.train.num_step=3",
            r"unknown key 'trainings.train.num_step'; did you mean 'trainings.train.num_steps'\?",
        ),
        ("source.image_size=3", r"unknown key 'source.image_size'; did you mean 'source.world.image_size'\?"),
        ("trainings.train.model.encoder.leyer=-1", r"did you mean 'trainings.train.model.encoder.layer'\?"),
        ("ingest.actors.number=3", r"did you mean '\w+.actors.num_actors'\?"),
        ("storage_option.profile=p", r"unknown key 'storage_option'; did you mean 'storage_options'\?"),
        ("curate.min_size=3", r"unknown key 'curate.min_size'; did you mean 'curate.min_side_px'\?"),
        (
            "source={kind: urls, path: l.csv, url_col: u}",
            r"'source.url_col'; did you mean 'source.url_column'\?",
        ),
        (
            "trainings.train.model.conditioning={method: noisy_latents, train_lm: true}",
            r"'trainings.train.model.conditioning.train_lm'; did you mean '[\w.]+.conditioning.train_llm'\?",
        ),
        ("last_stage=latents", r"last_stage is 'latents'; expected one of .*image_features.*train.*report"),
        (
            "columns.image_features.actors.num_actors=0",
            r"columns.image_features.actors.num_actors: .*greater than or equal to 1.*got 0",
        ),
        ("ingest.quality=10", r"ingest: .*quality 10 with encode png"),
        ("ingest.image_size=big", r"ingest.image_size: Input should be a valid integer.*got 'big'"),
        ("source.kind=urls", r"source.path: Field required"),
        (
            "source=url",
            r"source: .*'url'.*'scenes', 'edits', 'moving_scenes', 'urls', 'tars',",
        ),
        ("no-equals-sign", r"expected key.path=value"),
    ],
)
def test_a_mistake_is_named(tmp_path, override, message):
    path = tmp_path / "w.yaml"
    path.write_text("root: here\n")
    with pytest.raises(ConfigError, match=message):
        load_config(WorkflowConfig, path, [override])


def test_a_missing_or_broken_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(WorkflowConfig, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("root: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(WorkflowConfig, tmp_path / "bad.yaml")


def test_data_of_ones_own_is_evaluated_as_such(tmp_path):
    """No scenes: captions that training leaves out, and real images in the training's own encoder."""
    fields = {"root": tmp_path / "run", "source": {"kind": "folder", "path": str(tmp_path)}}
    config = WorkflowConfig.model_validate(fields)
    suite = config.evaluate.suites["prompts"]
    assert config.evaluate.suites.keys() == {"prompts"} and suite.file is None
    assert suite.images == config.training("train").data.images == tmp_path / "run" / "curate"
    assert suite.held_out_share == config.trainings["train"].data.held_out_share == 0.05
    assert (suite.encoder, suite.layer) == (config.trainings["train"].model.encoder.path, -2)
    again = WorkflowConfig.model_validate(config.model_dump(mode="json"))
    assert again.evaluate == config.evaluate

    changed = {**fields, "trainings": {"train": {"data": {"held_out_share": 0.2}}}, "data_url": "s3://b/x"}
    suite = WorkflowConfig.model_validate(changed).evaluate.suites["prompts"]
    assert (suite.held_out_share, suite.images) == (0.2, tmp_path / "run" / "columns" / "curate")
    chosen = {**fields, "evaluate": {"suites": {"mine": {"kind": "prompts", "file": "p.txt"}, "scenes": {}}}}
    suites = WorkflowConfig.model_validate(chosen).evaluate.suites
    assert suites["mine"].file.name == "p.txt" and suites["mine"].images is not None and "scenes" in suites

    drawn = WorkflowConfig.model_validate({"root": tmp_path / "run"})
    assert drawn.evaluate.suites.keys() == {"scenes"}
    assert drawn.trainings["train"].data.held_out_share == 0
