"""Runs in a real MLflow on SQLite."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from PIL import Image
from tiny_training import make_columns, make_foundation, tiny_train

from repfusion.lineage import environment
from repfusion.tracking import StoreError, Tracker, TrackingConfig, flatten, metric_history, prepare_store
from repfusion.train import train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'runs' / 'mlflow.db'}"
    prepare_store(uri, "test")
    return uri


def tracking(uri: str, **fields) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment="test", **{"system_metrics_sec": None, **fields})


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"step": folder.name}))
    return folder


def test_a_run_holds_what_was_logged(store: str, tmp_path: Path):
    tracker = Tracker(tracking(store, run_name="one"))
    tracker.log_config({"engine": {"lr": 0.1}, "seed": 3, "data": {"cache_bytes": 5}})
    tracker.log_metrics({"train/loss": 2.0}, step=5)
    (tmp_path / "x.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "x.txt", "folder")
    tracker.log_text("said", "notes/said.txt")
    tracker.finish()

    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    assert run.data.params == {"engine.lr": "0.1", "seed": "3"}
    assert run.data.metrics == {"train/loss": 2.0}
    assert [one.path for one in client.list_artifacts(tracker.run_id, "folder")] == ["folder/x.txt"]
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/notes/said.txt") == "said"
    config = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml"))
    assert config == {"engine": {"lr": 0.1}, "seed": 3, "data": {"cache_bytes": 5}}
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert list(artifacts.rglob("x.txt")), "artifacts lie beside the database"


def test_a_password_in_an_address_is_not_logged(store: str):
    tracker = Tracker(tracking(store))
    tracker.log_config({"init_from": "postgresql://me:secret@host/db"})
    tracker.finish()
    run = mlflow.MlflowClient(store).get_run(tracker.run_id)
    assert run.data.params["init_from"] == "postgresql://me:***@host/db"
    assert "secret" not in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml")


def test_a_run_says_what_it_was_made_with(store: str):
    tracker = Tracker(tracking(store))
    tracker.log_environment(world_size=4, left_out=None)
    tracker.finish()
    tags = mlflow.MlflowClient(store).get_run(tracker.run_id).data.tags
    assert tags["lock.digest"] == environment.lock_digest() and len(tags["lock.digest"]) == 64
    assert tags["mlflow.source.git.commit"] == environment.git_commit()
    assert tags["version.mlflow"] == mlflow.__version__ and tags["version.python"] == sys.version.split()[0]
    assert tags["world_size"] == "4" and "left_out" not in tags


def test_a_run_is_resumed_and_others_log_into_it(store: str):
    first = Tracker(tracking(store))
    first.log_params({"seed": 0})
    first.finish("FAILED")
    second = Tracker(first.config)
    second.log_params({"seed": 1, "added": 2})
    other = Tracker(first.config, attach=True)
    for step in (2, 1):
        other.log_metrics({"eval/overall": step / 10}, step)
    history = metric_history(store, first.run_id, "eval/overall")
    assert history == [(1, 0.1), (2, 0.2)], "in the store when the call returns"
    other.finish()
    assert mlflow.MlflowClient(store).get_run(first.run_id).info.status == "RUNNING"
    second.finish()
    run = mlflow.MlflowClient(store).get_run(first.run_id)
    assert second.run_id == first.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "added": "2"}


def test_of_a_step_taken_twice_the_later_counts(store: str):
    tracker = Tracker(tracking(store))
    for step, value in ((1, 1.0), (2, 2.0), (2, 2.5), (3, 3.0)):
        tracker.log_metrics({"train/loss": value}, step)
        time.sleep(0.01)
    tracker.finish()
    assert metric_history(store, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.5), (3, 3.0)]


def test_a_data_set_leads_back_to_its_columns(store: str, tmp_path: Path):
    for name, fingerprint in (("curate", "f1"), ("image_features", "f2")):
        (tmp_path / name).mkdir()
        manifest = {"fingerprint": fingerprint, "samples": 20, "seconds": 1.0}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "plain").mkdir()
    columns = {
        "images": tmp_path / "curate",
        "image_features": tmp_path / "image_features",
        "text": tmp_path / "plain",
    }
    tracker = Tracker(tracking(store))
    tracker.log_dataset("main", columns, 20)
    tracker.log_dataset("main", columns, 20)
    tracker.finish()

    run = mlflow.MlflowClient(store).get_run(tracker.run_id)
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.source_type) == ("main", "webdataset")
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}
    assert json.loads(logged.dataset.profile) == {"num_rows": 20, "num_columns": 3}
    assert {one["name"] for one in json.loads(logged.dataset.schema)["mlflow_colspec"]} == columns.keys()
    source = mlflow.data.get_source(logged)
    assert (
        source.columns["images"]["fingerprint"] == "f1" and source.columns["text"]["manifest_digest"] is None
    )
    assert source.load() == columns
    digest = run.data.tags["dataset.main.digest"]
    assert len(digest) == 64 and logged.dataset.digest == digest[:36]
    assert json.loads(run.data.tags["dataset.main.columns"])["columns"] == source.columns

    (tmp_path / "image_features" / "manifest.json").write_text(
        json.dumps({"fingerprint": "f3", "samples": 20})
    )
    with pytest.raises(ValueError, match=r"image_features: .*_features holds manifest \w+, the run read"):
        source.load()


def test_the_same_data_elsewhere_has_the_same_digest(store: str, tmp_path: Path):
    digests = []
    for place, samples in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": "f", "samples": samples}))
        tracker = Tracker(tracking(store))
        tracker.log_dataset("moved", {"images": folder}, samples)
        tracker.finish()
        tags = mlflow.MlflowClient(store).get_run(tracker.run_id).data.tags
        assert json.loads(tags["dataset.moved.columns"])["columns"]["images"]["folder"] == str(folder)
        digests.append(tags["dataset.moved.digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_process_that_never_imported_us_reads_the_source_back():
    entries = environment.metadata.entry_points(group="mlflow.dataset_source")
    assert "webdataset" in entries.names, (
        "the package was installed before it had this entry point; run 'make setup'"
    )
    source = get_dataset_source_from_json(json.dumps({"columns": {}}), "webdataset")
    assert type(source).__name__ == "WebDatasetSource"


def test_a_checkpoint_is_a_model_with_its_scores(store: str, tmp_path: Path):
    tracker = Tracker(tracking(store, registered_model="small/model:x"))
    tracker.log_params({"seed": 7})
    before = make_checkpoint(tmp_path / "step_00000500")
    files = {path: path.read_bytes() for path in before.iterdir()}
    for _ in range(2):  # as a training does that was killed after it and takes the step again
        model_id = tracker.log_checkpoint(before, 500, wait_sec=30.0)
        assert model_id is not None
    assert {path: path.read_bytes() for path in before.iterdir()} == files
    evaluation = Tracker(tracker.config, attach=True)
    evaluation.log_scores(500, {"eval/overall": 0.25, "eval/single": 0.5})
    tracker.finish()

    client = mlflow.MlflowClient(store)
    run = client.get_run(tracker.run_id)
    assert [(one.model_id, one.step) for one in run.outputs.model_outputs] == [(model_id, 500)]
    model = client.get_logged_model(model_id)
    name = f"{run.info.run_name} step 500"
    assert (model.name, model.model_type, str(model.status)) == (name, "checkpoint", "READY")
    assert model.source_run_id == tracker.run_id and model.params == {"seed": "7", "step": "500"}
    assert model.tags["folder"] == str(before) and len(model.tags["digest"]) == 64
    assert {(one.key, one.value, one.step) for one in model.metrics} == {
        ("eval/overall", 0.25, 500),
        ("eval/single", 0.5, 500),
    }
    assert metric_history(store, tracker.run_id, "eval/overall") == [(500, 0.25)]
    (version,) = client.search_model_versions("name = 'small-model-x'")
    assert version.run_id == tracker.run_id and version.tags["folder"] == str(before)


def test_best_and_latest_name_versions_over_all_runs(store: str, tmp_path: Path):
    name = "aliases"

    def alias(which: str) -> tuple[str, str]:
        version = mlflow.MlflowClient(store).get_model_version_by_alias(name, which)
        return version.run_id, version.tags["step"]

    first = Tracker(tracking(store, registered_model=name))
    for step in (1, 2, 3):
        first.log_checkpoint(make_checkpoint(tmp_path / "a" / f"{step}"), step)
    assert first.flush(30.0)
    assert alias("latest") == (first.run_id, "3")
    evaluation = Tracker(first.config, attach=True)
    evaluation.log_scores(3, {"eval/overall": 0.3}, "eval/overall")
    evaluation.log_scores(2, {"eval/overall": 0.7}, "eval/overall")
    evaluation.log_scores(1, {"eval/overall": float("nan")}, "eval/overall")
    assert alias("best") == (first.run_id, "2")
    second = Tracker(tracking(store, registered_model=name))
    second.log_checkpoint(make_checkpoint(tmp_path / "b" / "1"), 1)
    second.log_scores(1, {"eval/overall": 0.6}, "eval/overall")
    second.finish()
    assert alias("latest") == (second.run_id, "1")
    assert alias("best") == (first.run_id, "2")
    evaluation.log_scores(2, {"eval/overall": 0.1}, "eval/overall")  # scored again with other prompts
    assert alias("best") == (second.run_id, "1")
    with pytest.raises(ValueError, match=r"best_by is 'overall', the metrics are \['eval/overall'\]"):
        evaluation.log_scores(2, {"eval/overall": 0.1}, "overall")
    first.finish()


def test_a_pruned_checkpoint_stays_marked(store: str, tmp_path: Path):
    tracker = Tracker(tracking(store, registered_model="pruned"))
    model_id = tracker.log_checkpoint(make_checkpoint(tmp_path / "1"), 1, wait_sec=30.0)
    kept_id = tracker.log_checkpoint(make_checkpoint(tmp_path / "2"), 2, wait_sec=30.0)
    tracker.forget_checkpoint(1)
    tracker.forget_checkpoint(99)  # one that was never logged
    tracker.finish()
    client = mlflow.MlflowClient(store)
    assert client.get_logged_model(model_id).tags["files"] == "removed"
    assert client.get_logged_model(kept_id).tags["files"] == "present"
    tags = {one.tags["step"]: one.tags["files"] for one in client.search_model_versions("name = 'pruned'")}
    assert tags == {"1": "removed", "2": "present"}


def test_nested_runs_hang_under_theirs(store: str):
    parent = Tracker(tracking(store))
    child = parent.child("evaluation", {"step": "5"})
    child.log_metrics({"x": 1.0}, 0)
    child.log_text("Traceback", "error.txt")
    child.finish("FAILED")
    training = Tracker(parent.child("lr=0.1").config)  # as a sweep's worker does
    training.log_metrics({"x": 2.0}, 0)
    training.finish()
    client = mlflow.MlflowClient(store)
    assert client.get_run(parent.run_id).info.status == "RUNNING"
    parent.finish()
    experiment = client.get_run(parent.run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    by_name = {run.info.run_name: run for run in found}
    assert by_name["evaluation"].info.status == "FAILED" and by_name["evaluation"].data.tags["step"] == "5"
    assert by_name["evaluation"].data.metrics == {"x": 1.0}
    assert by_name["lr=0.1"].info.status == "FINISHED" and by_name["lr=0.1"].data.metrics == {"x": 2.0}


def test_runs_of_a_sweep_hang_under_one(store: str):
    runs = []
    for name in ("lr 1e-3", "lr 3e-4"):
        tracker = Tracker(tracking(store, run_name=name, sweep="learning-rate"))
        tracker.finish()
        runs.append(mlflow.MlflowClient(store).get_run(tracker.run_id))
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert len(parents) == 1
    parent = mlflow.MlflowClient(store).get_run(parents.pop())
    assert (parent.info.run_name, parent.info.status) == ("learning-rate", "FINISHED")
    with pytest.raises(ValueError, match="sweep"):
        tracking(store, sweep="it's")


def test_images_of_a_key_form_a_gallery_by_step(store: str, tmp_path: Path):
    tracker = Tracker(tracking(store))
    for step in (100, 200):
        path = tmp_path / f"{step}.png"
        Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
        tracker.log_image(path, "samples/grid", step)
    tracker.finish()
    client = mlflow.MlflowClient(store)
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"
    names = [Path(one.path).name for one in client.list_artifacts(tracker.run_id, "images")]
    # MLflow's page reads key and step from the names
    steps = sorted(name.split("+")[2] for name in names if name.endswith(".png"))
    assert steps == ["100", "200"] and all(name.startswith("samples~grid+step+") for name in names)


def test_a_node_is_watched_until_the_end(store: str):
    before = set(threading.enumerate())
    tracker = Tracker(tracking(store, system_metrics_sec=0.2))
    tracker.start_system_metrics("node-a")
    other = Tracker(tracker.config, attach=True)  # as the first process of another node does
    other.start_system_metrics("node-b")
    time.sleep(0.7)
    other.finish()
    tracker.finish()
    assert set(threading.enumerate()) <= before
    for node in ("node-a", "node-b"):
        history = metric_history(store, tracker.run_id, f"system/{node}/cpu_utilization_percentage")
        assert [step for step, _ in history] == list(range(len(history))) and len(history) >= 2
    resumed = Tracker(tracker.config)
    resumed.start_system_metrics("node-a")
    resumed.finish()
    again = metric_history(store, tracker.run_id, "system/node-a/cpu_utilization_percentage")
    assert len(again) > 2 and [step for step, _ in again] == sorted({step for step, _ in again})


def test_logging_is_cheap(store: str):
    tracker = Tracker(tracking(store))
    metrics = {f"m{number}": float(number) for number in range(12)}
    seconds = []
    for step in range(500):
        start = time.perf_counter()
        tracker.log_metrics(metrics, step)
        seconds.append(time.perf_counter() - start)
    tracker.finish()
    assert sorted(seconds)[len(seconds) // 2] < 1e-3
    assert metric_history(store, tracker.run_id, "m11") == [(step, 11.0) for step in range(500)]


def test_one_wrong_name_takes_no_other_metric_with_it(store: str, caplog: pytest.LogCaptureFixture):
    tracker = Tracker(tracking(store))
    for step in range(4):
        tracker.log_metrics({"bad\nname" if step == 2 else "fine": 1.0}, step)
    tracker.log_artifact(Path("nowhere.txt"))
    tracker.finish()
    assert [step for step, _ in metric_history(store, tracker.run_id, "fine")] == [0, 1, 3]
    assert mlflow.MlflowClient(store).get_run(tracker.run_id).data.tags["tracking.num_lost"] == "2"
    assert "metrics of step 2" in caplog.text and "nowhere.txt" in caplog.text


def test_numbers_that_are_not_finite_are_kept(store: str):
    tracker = Tracker(tracking(store))
    tracker.log_metrics({"loss": float("nan")}, 1)
    tracker.log_metrics({"loss": float("inf")}, 2)
    tracker.finish()
    (_, first), (_, second) = metric_history(store, tracker.run_id, "loss")
    assert first != first and second > 1e300


def test_where_no_run_can_start_the_reason_is_said(tmp_path: Path):
    with pytest.raises(StoreError, match=r"tracking.uri http://me:\*\*\*@127.0.0.1:9: cannot start a run"):
        Tracker(tracking("http://me:secret@127.0.0.1:9"))
    with pytest.raises(
        ValueError, match=r"tracking.artifacts is not set, and postgresql://me:\*\*\*@host/db is"
    ):
        Tracker(tracking("postgresql://me:secret@host/db"))
    (tmp_path / "file.db").write_text("this is no database, and long enough that SQLite sees it")
    with pytest.raises(StoreError, match=r"file\.db: cannot start a run"):
        Tracker(tracking(f"sqlite:///{tmp_path / 'file.db'}"))


def test_artifacts_go_where_the_config_says(tmp_path: Path):
    uri, elsewhere = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "elsewhere"
    tracker = Tracker(tracking(uri, artifacts=str(elsewhere)))
    tracker.log_config({"a": 1})
    tracker.finish()
    assert len(list(elsewhere.rglob("config.yaml"))) == 1
    with pytest.raises(
        ValueError, match=r"keeps its artifacts at file://\S*elsewhere, not at file://\S*other"
    ):
        Tracker(tracking(uri, artifacts=str(tmp_path / "other")))


def in_processes(code: str, count: int, *arguments: str) -> None:
    """Runs Python code in several processes at once; its `sys.argv` are its number and the arguments."""
    code = f"import sys\nfrom repfusion.tracking import Tracker, TrackingConfig\n{code}"
    commands = [[sys.executable, "-c", code, str(number), *arguments] for number in range(count)]
    for process in [subprocess.Popen(command, cwd=ROOT) for command in commands]:
        assert process.wait(120) == 0


@pytest.mark.slow
def test_processes_log_into_one_run_at_the_same_time(store: str):
    tracker = Tracker(tracking(store))
    code = (
        "number, uri, run_id = sys.argv[1:]\n"
        "tracker = Tracker(TrackingConfig(uri=uri, experiment='test', run_id=run_id), attach=True)\n"
        "for step in range(10):\n"
        "    tracker.log_metrics({f'm{number}': step}, step)\n"
    )
    in_processes(code, 2, store, str(tracker.run_id))
    tracker.finish()
    for n in range(2):
        assert metric_history(store, tracker.run_id, f"m{n}") == [(step, float(step)) for step in range(10)]


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_store(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    in_processes("Tracker(TrackingConfig(uri=sys.argv[2], experiment='test')).finish()", 2, uri)
    client = mlflow.MlflowClient(uri)
    assert len(client.search_runs([client.get_experiment_by_name("test").experiment_id])) == 2


def test_without_an_address_nothing_happens(tmp_path: Path):
    tracker = Tracker(TrackingConfig())
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_config({"a": 1})
    tracker.log_environment(world_size=1)
    tracker.log_dataset("main", {"images": tmp_path}, 1)
    tracker.log_scores(1, {"a": 1.0}, "a")
    tracker.start_system_metrics()
    tracker.forget_checkpoint(1)
    tracker.child("x").finish("FAILED")
    assert tracker.log_checkpoint(tmp_path, 1) is None and tracker.flush(1.0)
    tracker.finish()
    assert tracker.run_id is None


def test_nested_fields_become_dotted_parameters():
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": "1", "d": "None"}


def test_a_training_logs_one_run_and_resumes_it(store: str, tmp_path: Path):
    world = make_foundation(tmp_path / "weights"), make_columns(tmp_path / "data")
    config = tiny_train(*world, tmp_path / "out", tracking=tracking(store), num_steps=2)
    first = train(config)
    second = train(config.model_copy(update={"num_steps": 4}))
    assert second["run_id"] == first["run_id"] is not None
    losses = metric_history(store, first["run_id"], "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert losses[-1][1] == pytest.approx(second["final_loss"], rel=0.5)
    run = mlflow.MlflowClient(store).get_run(first["run_id"])
    assert run.data.params["engine.precision"] == "fp32"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"main"}
    (source,) = [mlflow.data.get_source(one) for one in run.inputs.dataset_inputs]
    assert {"images", "image_features"} <= set(source.columns)
