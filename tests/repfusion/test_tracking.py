"""Runs in a real MLflow on SQLite."""

import multiprocessing
from pathlib import Path

import mlflow
import pytest
from tiny_training import make_columns, make_foundation, tiny_train

from repfusion.tracking import Tracker, TrackingConfig, flatten, metric_history, prepare_store
from repfusion.train import train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'runs' / 'mlflow.db'}"
    prepare_store(uri, "test")
    return uri


def test_a_run_holds_what_was_logged(store: str, tmp_path: Path):
    tracker = Tracker(TrackingConfig(uri=store, experiment="test", run_name="one"))
    tracker.log_params({"engine": {"lr": 0.1}, "seed": 3})
    tracker.log_metrics({"train/loss": 2.0}, step=5)
    tracker.log_dataset("features", "ab" * 32, "latents", 20)
    (tmp_path / "x.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "x.txt", "folder")
    tracker.finish()

    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    assert run.data.params == {"engine.lr": "0.1", "seed": "3"}
    assert run.data.metrics == {"train/loss": 2.0}
    assert run.inputs.dataset_inputs[0].dataset.digest == ("ab" * 32)[:36]
    assert run.data.tags["dataset.features.digest"] == "ab" * 32
    assert [one.path for one in client.list_artifacts(tracker.run_id, "folder")] == ["folder/x.txt"]
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert list(artifacts.rglob("x.txt")), "artifacts lie beside the database"


def test_a_run_is_resumed_and_others_log_into_it(store: str):
    first = Tracker(TrackingConfig(uri=store, experiment="test"))
    first.log_params({"seed": 0})
    first.finish("FAILED")
    config = TrackingConfig(uri=store, experiment="test", run_id=first.run_id)
    second = Tracker(config)
    second.log_params({"seed": 1, "added": 2})
    other = Tracker(config, attach=True)
    for step in (2, 1):
        other.log_metrics({"eval/overall": step / 10}, step)
    second.finish()
    run = mlflow.MlflowClient(store).get_run(first.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "added": "2"}
    assert metric_history(store, first.run_id, "eval/overall") == [(1, 0.1), (2, 0.2)]


def log_from_a_process(uri: str, run_id: str, number: int) -> None:
    tracker = Tracker(TrackingConfig(uri=uri, experiment="test", run_id=run_id), attach=True)
    for step in range(10):
        tracker.log_metrics({f"m{number}": step}, step)


def test_processes_log_into_one_run_at_the_same_time(store: str):
    tracker = Tracker(TrackingConfig(uri=store, experiment="test"))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=log_from_a_process, args=(store, tracker.run_id, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for n in range(2):
        assert metric_history(store, tracker.run_id, f"m{n}") == [(step, float(step)) for step in range(10)]


def test_without_an_address_nothing_happens(tmp_path: Path):
    tracker = Tracker(TrackingConfig())
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_params({"a": 1})
    tracker.finish()
    assert tracker.run_id is None


def test_nested_fields_become_dotted_parameters():
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": "1", "d": "None"}


def test_a_training_logs_one_run_and_resumes_it(store: str, tmp_path: Path):
    world = make_foundation(tmp_path / "weights"), make_columns(tmp_path / "data")
    tracking = TrackingConfig(uri=store, experiment="test")
    config = tiny_train(*world, tmp_path / "out", tracking=tracking, num_steps=2)
    first = train(config)
    second = train(config.model_copy(update={"num_steps": 4}))
    assert second["run_id"] == first["run_id"] is not None
    losses = metric_history(store, first["run_id"], "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert losses[-1][1] == pytest.approx(second["final_loss"], rel=0.5)
    run = mlflow.MlflowClient(store).get_run(first["run_id"])
    assert run.data.params["engine.precision"] == "fp32"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"images", "features"}
