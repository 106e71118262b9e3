"""Runs in a real PostgreSQL with artifacts in a real S3 server, with and without MLflow's own server between,
and what a training notices when one of them is away.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image
from postgres import Postgres
from programs import outputs

from repfusion.tracking import StoreError, Tracker, TrackingConfig, metric_history
from repfusion.tracking.store import client_of, with_driver

ROOT = Path(__file__).resolve().parents[3]
BUCKET = "tracking"
MAX_CALL_SEC = 0.1
"""What a call of a training may take, whatever the store does; a busy machine's share included."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server, which mlflow finds by the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


class Server:
    """MLflow's own server on loopback; `stop` kills it as an out-of-memory does."""

    def __init__(self, store: str, artifacts: str, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.store, self.artifacts, self.log = (
            f"http://127.0.0.1:{self.port}",
            store,
            artifacts,
            log,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", self.artifacts]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(postgres: Postgres, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MLflow's server over PostgreSQL, which hands artifacts on to S3."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = Server(with_driver(postgres.create("served")), f"s3://{BUCKET}/served", log)
    server.start()
    yield server
    server.stop()


def tracking(uri: str, **fields: Any) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment="test", **{"system_metrics_sec": None, **fields})


def keys(s3: Any, prefix: str) -> list[str]:
    return [one["Key"] for one in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def make_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)
    return path


def log_a_training(config: TrackingConfig, folder: Path) -> Tracker:
    """One call of every kind."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "manifest.json").write_text('{"fingerprint": "f1"}')
    checkpoint = folder / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_text("{}")
    tracker = Tracker(config)
    tracker.log_config({"engine": {"lr": 0.1}})
    tracker.log_environment(world_size=1)
    tracker.log_dataset("main", {"images": folder / "data"}, 5)
    tracker.log_metrics({"train/loss": 1.5}, 1)
    tracker.log_image(make_image(folder / "grid.png"), "samples", 2)
    assert tracker.log_checkpoint(checkpoint, 2, wait_sec=60.0) is not None
    evaluation = Tracker(tracker.config, attach=True)
    child = evaluation.child("evaluation", {"step": "2"})
    child.log_text("done", "said.txt")
    child.finish()
    evaluation.log_scores(2, {"eval/overall": 0.5}, "eval/overall")
    tracker.finish()
    return tracker


def check_a_training(tracker: Tracker, s3: Any, prefix: str) -> None:
    client = client_of(str(tracker.uri))
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED" and "tracking.num_lost" not in run.data.tags
    assert run.data.params == {"engine.lr": "0.1"}
    assert run.data.metrics == {"train/loss": 1.5, "eval/overall": 0.5}
    source = mlflow.data.get_source(run.inputs.dataset_inputs[0])
    assert source.columns["images"]["fingerprint"] == "f1"  # type: ignore[attr-defined]
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (str(model.status), model.params["step"]) == ("READY", "2")
    assert [(one.key, one.value, one.step) for one in model.metrics or []] == [("eval/overall", 0.5, 2)]
    for alias in ("best", "latest"):
        version = client.get_model_version_by_alias("test", alias)
        assert (version.run_id, version.tags["step"]) == (tracker.run_id, "2")
    stored = [key for key in keys(s3, prefix) if str(tracker.run_id) in key]
    assert any(key.endswith("/config.yaml") for key in stored)
    assert sorted(Path(key).suffix for key in stored if "/images/" in key) == [".png", ".webp"]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    assert [one.info.run_name for one in children] == ["evaluation"]
    assert any(children[0].info.run_id in key and key.endswith("said.txt") for key in keys(s3, prefix))


def test_postgresql_and_s3_hold_a_run(postgres: Postgres, s3: Any, tmp_path: Path):
    uri = postgres.create("direct")
    tracker = log_a_training(tracking(uri, artifacts=f"s3://{BUCKET}/direct"), tmp_path)
    check_a_training(tracker, s3, "direct/")


@pytest.mark.slow
def test_processes_that_start_at_once_make_one_schema(postgres: Postgres):
    uri = postgres.create("many")
    code = (
        "import sys\n"
        "from repfusion.tracking import prepare_store\n"
        f"print(prepare_store(sys.argv[1], 'test', 's3://{BUCKET}/many'))\n"
    )
    command = [sys.executable, "-c", code, uri]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = outputs(started)
    assert [process.returncode for process in started] == [0, 0, 0]
    assert set(said) == {f"{client_of(uri).get_experiment_by_name('test').experiment_id}\n"}


def log_while_away(tracker: Tracker, steps: range, folder: Path) -> None:
    """Metrics each step, an image and a checkpoint: every call returns at once."""
    longest = 0.0
    for step in steps:
        start = time.perf_counter()
        tracker.log_metrics({"train/loss": float(step), "grad_norm": 0.5}, step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.002)
    start = time.perf_counter()
    tracker.log_image(make_image(folder / "away.png"), "samples", steps.stop)
    tracker.log_checkpoint(folder, steps.stop)
    tracker.set_tag("said", "while away")
    assert max(longest, time.perf_counter() - start) < MAX_CALL_SEC


def check_nothing_lost(tracker: Tracker, num_steps: int) -> None:
    client = client_of(str(tracker.uri))
    history = client.get_metric_history(str(tracker.run_id), "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(n, float(n)) for n in range(num_steps)]
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED"
    assert "tracking.num_lost" not in run.data.tags and run.data.tags["said"] == "while away"
    assert [one.step for one in run.outputs.model_outputs] == [num_steps]
    images = [one.path for one in client.list_artifacts(str(tracker.run_id), "images")]
    assert len([path for path in images if path.endswith(".png")]) == 1


def check_told(caplog: pytest.LogCaptureFixture) -> None:
    """That the store was away is said once, and that it is back; neither by other libraries."""
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(told) == 2 and "training goes on" in told[0] and "answers again" in told[1]


def test_a_database_that_is_away_loses_nothing(
    postgres: Postgres, s3: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    uri = postgres.create("away")
    tracker = Tracker(tracking(uri, artifacts=f"s3://{BUCKET}/away"))
    tracker.log_metrics({"train/loss": 0.0}, 0)
    assert tracker.flush(60.0)
    postgres.stop()
    try:
        log_while_away(tracker, range(1, 200), tmp_path)
        assert not tracker.flush(2.0)
    finally:
        postgres.start()
    tracker.finish()
    check_nothing_lost(tracker, 200)
    check_told(caplog)


@pytest.mark.slow
def test_images_wait_for_their_store_and_hold_up_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moto.server import ThreadedMotoServer

    first = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
    import boto3

    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="images")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(tracking(uri, artifacts="s3://images/here"))
    first.stop()
    tracker.log_image(make_image(tmp_path / "away.png"), "samples", 1)
    deadline, steps = time.monotonic() + 120, []
    for step in range(3):  # each sent while the image before it waits
        tracker.log_metrics({"train/loss": 1.0}, step)
        while step not in steps and time.monotonic() < deadline:
            time.sleep(0.1)
            steps = [one for one, _ in metric_history(uri, str(tracker.run_id), "train/loss")]
    assert steps == [0, 1, 2] and not tracker.flush(0.1)
    again = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    again.start()
    try:
        tracker.finish()
        images = [one.path for one in client_of(uri).list_artifacts(str(tracker.run_id), "images")]
    finally:
        again.stop()
    assert sorted(Path(path).suffix for path in images) == [".png", ".webp"]


@pytest.mark.slow
def test_a_server_over_postgresql_and_s3_holds_a_run(server: Server, s3: Any, tmp_path: Path):
    tracker = log_a_training(tracking(server.url), tmp_path)
    check_a_training(tracker, s3, "served/")


@pytest.mark.slow
def test_a_server_that_is_away_loses_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tracker = Tracker(tracking(server.url, system_metrics_sec=0.5))
    tracker.start_system_metrics("node")
    tracker.log_metrics({"train/loss": 0.0}, 0)
    assert tracker.flush(60.0)
    server.stop()
    try:
        log_while_away(tracker, range(1, 200), tmp_path)
        time.sleep(4.0)
        log_while_away(tracker, range(200, 300), tmp_path / "later")
    finally:
        server.start()
    assert tracker.flush(120.0)
    tracker.finish()
    client = client_of(server.url)
    history = client.get_metric_history(str(tracker.run_id), "train/loss")
    assert sorted((one.step, one.value) for one in history) == [(n, float(n)) for n in range(300)]
    watched = metric_history(server.url, str(tracker.run_id), "system/node/cpu_utilization_percentage")
    assert [step for step, _ in watched] == list(range(len(watched))) and len(watched) > 8
    run = client.get_run(str(tracker.run_id))
    assert sorted(one.step for one in run.outputs.model_outputs) == [200, 300]
    check_told(caplog)


@pytest.mark.slow
def test_what_exceeds_the_memory_is_counted(server: Server):
    tracker = Tracker(tracking(server.url, max_buffered_metrics=100))
    server.stop()
    try:
        for step in range(300):
            tracker.log_metrics({"train/loss": 1.0}, step)
        time.sleep(3.0)
    finally:
        server.start()
    tracker.finish()
    kept = [step for step, _ in metric_history(server.url, str(tracker.run_id), "train/loss")]
    tags = client_of(server.url).get_run(str(tracker.run_id)).data.tags
    assert kept == list(range(200, 300)) and tags["tracking.num_lost"] == "200"


@pytest.mark.slow
def test_a_run_ends_in_time_without_its_server(server: Server, caplog: pytest.LogCaptureFixture):
    tracker = Tracker(tracking(server.url, flush_sec=3.0))
    evaluation = Tracker(tracker.config, attach=True)
    server.stop()
    try:
        tracker.log_metrics({"train/loss": 1.0, "lr": 0.1}, 1)
        start = time.monotonic()
        with pytest.raises(StoreError):
            evaluation.log_scores(1, {"eval/overall": 1.0})
        assert time.monotonic() - start < 15
        start = time.monotonic()
        tracker.finish()
        assert time.monotonic() - start < 15
    finally:
        server.start()
    assert "2 values or calls: metrics" in caplog.text and "stays open" in caplog.text
    assert client_of(server.url).get_run(str(tracker.run_id)).info.status == "RUNNING"
