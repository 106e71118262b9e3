"""The train and evaluate stages on a real local Ray: two DeepSpeed ranks, evaluations beside them, one
MLflow run.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tiny_training import make_columns, make_foundation, tiny_train

from pipelines.config import WorkflowConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.records import finished
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.ranks import launch
from pipelines.runtime.session import StageError
from pipelines.shards.manifest import Manifest, ShardTable, write_output
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA, Sidecar
from pipelines.stages.evaluate import run_evaluate
from pipelines.stages.train import run_train
from repfusion.data.columns import manifest_digest
from repfusion.tracking import TrackingConfig, metric_history
from repfusion.train import TrainConfig, train

EVALUATE = {
    "every_steps": 4,
    "suites": {"scenes": {"num_prompts": 6}},
    "sampler": {"num_steps": 1},
    "batch_size": 6,
}


def workflow(root: Path) -> tuple[WorkflowConfig, TrainConfig]:
    """A base of one step, then a training of four that continues from it."""
    foundation, columns = make_foundation(root / "weights"), make_columns(root / "run")
    base = tiny_train(foundation, columns, root / "base")
    train = tiny_train(foundation, columns, root / "run" / "train", {"micro_batch_size": 4})
    values = train.model_dump(mode="json", exclude={"data", "output_dir", "tracking"})
    values = {
        "root": root / "run",
        "trainings": {"train": {**values, "num_workers": 2}},
        "evaluate": EVALUATE,
    }
    return WorkflowConfig.model_validate(values), base


def trains(config: WorkflowConfig) -> dict[str, Any]:
    train = config.trainings["train"]
    return run_train(
        config.training("train"), train.num_workers, train.max_failures, [], config.evaluate, config.ray
    )


def evaluates(config: WorkflowConfig) -> dict[str, Any]:
    return run_evaluate(config.evaluate, config.training("train"), config.ray, config.root)


@pytest.fixture(scope="module")
def trained(ray_local, pool, tmp_path_factory: pytest.TempPathFactory):
    config, base = workflow(tmp_path_factory.mktemp("workflow"))
    train(base.model_copy(update={"num_steps": 1}))
    start = base.output_dir / "checkpoints" / "step_00000001"
    started = config.trainings["train"].model_copy(update={"init_from": start})
    config = config.model_copy(update={"trainings": {"train": started}})
    pool.close()  # its idle actors hold the CPUs
    return config, trains(config), evaluates(config)


@pytest.mark.ray
def test_two_ranks_train_and_every_checkpoint_is_scored(trained):
    config, summary, evaluated = trained
    assert (summary["steps"], summary["world_size"], summary["resumed_at_step"]) == (4, 2, 0)
    assert summary["samples_per_sec"] > 0 and summary["final_loss"] > 0
    assert [one["step"] for one in evaluated["evaluations"]] == [0, 4]
    for step in (0, 4):
        folder = config.root / "evaluate" / f"step_{step:08d}"
        assert (folder / "scores.json").is_file() and (folder / "gallery.png").is_file()
    assert (config.root / "gallery.png").read_bytes() == (folder / "gallery.png").read_bytes()


@pytest.mark.ray
def test_one_mlflow_run_holds_the_training_and_the_scores(trained):
    _, summary, evaluated = trained
    uri, run_id = summary["tracking_uri"], summary["run_id"]
    assert [step for step, _ in metric_history(uri, run_id, "train/loss")] == [1, 2, 3, 4]
    scores = metric_history(uri, run_id, "eval/overall")
    found = [(one["step"], one["suites"]["scenes"]) for one in evaluated["evaluations"]]
    assert scores == [(step, scenes["values"][scenes["headline"]]) for step, scenes in found]
    client = mlflow.MlflowClient(uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.list_artifacts(run_id, "evaluate")) == 2
    galleries = [Path(one.path).name for one in client.list_artifacts(run_id, "images")]
    for step in (0, 4):  # MLflow's page shows them with a slider over the steps
        assert any(re.fullmatch(rf"gallery.step.{step}.timestamp.*\.png", name) for name in galleries)


@pytest.mark.slow
@pytest.mark.ray
def test_nothing_is_trained_or_scored_twice(trained):
    config, summary, evaluated = trained
    scores = config.trainings["train"].output_dir / "evaluations" / "step_00000004" / "scores.json"
    before = scores.stat().st_mtime_ns
    assert trains(config) == summary
    assert evaluates(config)["evaluations"] == evaluated["evaluations"]
    assert scores.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_evaluation_fails_the_job_after_the_others(trained, tmp_path: Path):
    config, _, _ = trained
    untracked = config.training("train").model_copy(
        update={"output_dir": tmp_path, "tracking": TrackingConfig()}
    )
    shutil.copytree(config.trainings["train"].output_dir / "checkpoints", tmp_path / "checkpoints")
    broken = tmp_path / "checkpoints" / "step_00000002" / "ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    once = config.evaluate.model_copy(update={"max_attempts": 1, "every_steps": None})
    scheduler = EvaluationScheduler(once, untracked)
    with pytest.raises(
        StageError, match=r"1 of 3 evaluations failed: step_00000002: ValueError: .*100 bytes"
    ):
        scheduler.finish()
    assert finished(scheduler.folder / "step_00000004", config.evaluate.scoring) is not None


@pytest.mark.slow
@pytest.mark.ray
def test_a_rank_that_fails_says_why(trained, tmp_path: Path):
    config, _, _ = trained
    with pytest.raises(StageError, match=r"train: rank 0: ValueError: .*does not exist"):
        launch(
            config.training("train").model_copy(
                update={"output_dir": tmp_path, "init_from": tmp_path / "none"}
            ),
            1,
        )
    with pytest.raises(ValueError, match="num_workers is 64, the cluster has 2 CPUs"):
        launch(config.training("train"), 64)


def test_which_checkpoints_are_evaluated():
    every = EvaluateConfig(every_steps=400)
    assert [step for step in range(0, 1001, 200) if every.includes(step, 1000)] == [0, 400, 800, 1000]
    assert all(EvaluateConfig().includes(step, 1000) for step in range(0, 1001, 200))


def test_another_configuration_is_scored_again(tmp_path: Path):
    assert finished(tmp_path, EvaluateConfig().scoring) is None


def test_the_digest_is_that_of_the_manifest(tmp_path: Path):
    sidecar = Sidecar(
        name="00000", file="00000.tar", fingerprint="f", inputs={}, samples=1, bytes=2, sha256="s", drops={},
        files={}, seconds=1.5, versions={"torch": "2"},
    )  # fmt: skip
    shards = ShardTable.of([sidecar])
    manifest = Manifest(
        stage="image_features", fingerprint="f", fields={"ü": 1.5}, upstream={}, lineage={}, num_shards=1,
        samples=1, bytes=2, shards_digest=shards.digest, drops={}, seconds=3.0, shard_seconds=1.5, files={},
        extra={},
    )  # fmt: skip
    write_output(Folder.at(tmp_path), manifest, shards)
    assert manifest_digest(tmp_path) == manifest.digest
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert (written["seconds"], written["schema"]) == (3.0, SCHEMA)
