"""The whole of a deployment on this machine, `make test-cluster`: head and three workers with a token, data
in S3, MLflow's server with passwords over PostgreSQL. A workflow runs as a job, undisturbed and with a worker
killed while it encodes and one while it trains; both give the same bytes. Whoever has a wrong token or
password stays out, and no secret is found in what it all leaves.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
import yaml
from killing import LOOPBACK, listening_addresses, parent_of
from running import data_files
from services import database, mlflow_server, s3_server

from cluster.kinds import processes
from cluster.record import ClusterRecord
from pipelines.shards.storage import Folder
from repfusion.files import file_sha256
from repfusion.runs.folder import complete_checkpoints, step_of
from repfusion.tracking import metric_history

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SECRETS = {"dsn": "Zq7dsnSecretXk", "s3": "Zq7s3SecretXk", "mlflow": "Zq7mlflowSecretXk"}
BUCKET = "data"
STEPS, EVERY = 80, 20
NUM_SHARDS = 24
LIMIT_SEC = 900.0
WORKFLOW = {
    "root": "runs/calm",
    "last_stage": "train",
    "evaluate": {"beside_training": False},
    "source": {"kind": "scenes", "num_samples": 10 * NUM_SHARDS, "shard_size": 10},
    "trainings": {
        "train": {
            "model": {"dit": {"hidden_size": 96, "depth": 1, "num_heads": 2}},
            "engine": {"precision": "fp32", "micro_batch_size": 4, "num_threads": 1, "warmup_steps": 1},
            **{"global_batch_size": 8, "num_steps": STEPS, "checkpoint_every_steps": EVERY},
            **{"log_every_steps": 1, "keep_last": 99, "num_workers": 2},
        }
    },
}
CLUSTER = {
    "kind": "local",
    "token": True,
    "workers": {
        "ingest": {"count": 1, "num_cpus": 1, "labels": {"role": "ingest"}},
        "encode": {"count": 2, "num_cpus": 1, "labels": {"role": "encode"}},
    },
    "storage": {"data_url": f"s3://{BUCKET}/flows"},
    "stop_sec": 60,
}


class Deployment:
    """A folder with a workflow and a cluster, and the commands that a user gives there."""

    def __init__(self, folder: Path, s3: str, mlflow: str, dsn: str):
        self.folder, self.s3, self.mlflow, self.dsn = folder, s3, mlflow, dsn
        self.commands: set[str] = set()
        """Command lines of all processes of the machine, looked at again and again."""
        flow = {**WORKFLOW, "storage_options": {"endpoint_url": s3}}
        (folder / "flow.yaml").write_text(yaml.safe_dump(flow))
        (folder / "four.yaml").write_text(yaml.safe_dump({**CLUSTER, "mlflow_uri": mlflow}))

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, code: int = 0, **environment: str) -> str:
        """What a command says."""
        process = self.start(*words, **environment)
        try:
            said, _ = process.communicate(timeout=LIMIT_SEC)
        finally:
            process.kill()
        assert process.returncode == code, said
        return said

    def cluster(self, *words: str, code: int = 0) -> str:
        return self.run("cluster", *words, "--cluster", "four.yaml", code=code)

    @property
    def record(self) -> ClusterRecord:
        path = self.folder / "runs/clusters/four/cluster.json"
        return ClusterRecord.model_validate_json(path.read_bytes())

    @property
    def token(self) -> Path:
        return self.folder / "runs/clusters/four/token"

    def data(self, name: str) -> Folder:
        """The data of one of the two runs."""
        return Folder(f"s3://{BUCKET}/flows/{name}", {"endpoint_url": self.s3})

    def checkpoints(self, name: str) -> list[Path]:
        return complete_checkpoints(self.folder / "runs" / name / "train/checkpoints")

    def kill(self, node: str) -> None:
        """SIGKILL to a node with all that runs on it."""
        pid = next(one.pid for one in self.record.nodes if one.name == node)
        os.killpg(pid, signal.SIGKILL)

    def node_of(self, pid: int) -> str:
        """The node that a process runs on."""
        nodes = {one.pid: one.name for one in self.record.nodes}
        while pid not in nodes:
            above = parent_of(pid)
            assert above, f"{pid} runs on none of the nodes"
            pid = above
        return nodes[pid]

    def rank_s_node(self) -> str:
        """A node on which a rank trains."""
        found = processes.marked(self.record.mark)
        ranks = [pid for pid, command in found.items() if "TrainWorker" in command]
        assert len(ranks) == 2, found
        return self.node_of(ranks[0])

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Keeps all command lines that appear in the time of the block."""
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(1.0):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        self.commands.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                    except OSError:
                        continue

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def until(condition: Callable[[], object], following: "subprocess.Popen[str]") -> None:
    """Waits for a moment of a job, whose log a process follows; it must not be over before."""
    start = time.monotonic()
    while not condition():
        if following.poll() is not None:
            assert following.stdout is not None
            raise AssertionError(f"over too early:\n{following.stdout.read()}")
        assert time.monotonic() - start < LIMIT_SEC, "it did not come"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Everything is up, nothing has run."""
    folder = tmp_path_factory.mktemp("user")
    private = tmp_path_factory.mktemp("services")
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRETS["s3"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_TRACKING_USERNAME": "tracker",
        "MLFLOW_TRACKING_PASSWORD": SECRETS["mlflow"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with s3_server(private / "s3.log") as s3, database(SECRETS["dsn"]) as dsn:
            boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=BUCKET)
            of_server = (f"s3://{BUCKET}/artifacts", s3, "tracker", SECRETS["mlflow"], private / "mlflow")
            with mlflow_server(dsn, *of_server) as mlflow:
                deployment = Deployment(folder, s3, mlflow, dsn)
                with deployment.looked_at():
                    yield from up(deployment)


def up(place: Deployment) -> Iterator[Deployment]:
    """The cluster of a deployment, ended whatever happens."""
    try:
        place.cluster("up")
        yield place
    finally:
        if (place.folder / "runs/clusters/four/cluster.json").is_file():
            mark = place.record.mark
            place.start("cluster", "down", "--cluster", "four.yaml").communicate()
            processes.end_rest(mark)


@pytest.fixture(scope="module")
def calm(place: Deployment) -> str:
    """What the undisturbed job said."""
    said = place.cluster("submit", "flow.yaml", "--follow")
    assert ": SUCCEEDED" in said
    return said


@pytest.fixture(scope="module")
def cut(place: Deployment, calm: str) -> str:
    """What the job said of which two workers were killed."""
    words = ["cluster", "submit", "flow.yaml", "root=runs/cut", "--follow", "--cluster", "four.yaml"]
    features = place.data("cut") / "image_features"
    following = place.start(*words)
    try:
        until(lambda: {one for one in features.names() if one[0] == "0"}, following)
        place.kill("encode-0")
        left = NUM_SHARDS - len([name for name in features.names() if name.endswith(".json")])
        assert left > 0 and "manifest.json" not in features.names(), "it was encoded before the kill"
        assert "has encode-0 again" in place.cluster("up")
        until(lambda: place.checkpoints("cut"), following)
        assert step_of(place.checkpoints("cut")[-1]) < STEPS, "it was trained before the kill"
        node = place.rank_s_node()
        place.kill(node)
        assert f"has {node} again" in place.cluster("up")
        said, _ = following.communicate(timeout=LIMIT_SEC)
    finally:
        following.kill()
    assert following.returncode == 0 and ": SUCCEEDED" in said, said
    return said


def test_everything_listens_on_loopback_alone(place: Deployment):
    assert listening_addresses(list(processes.marked(place.record.mark))) <= LOOPBACK


def test_shards_are_those_of_the_undisturbed_run(place: Deployment, cut: str):
    expected, found = data_files(place.data("calm")), data_files(place.data("cut"))
    assert (
        sum(name.startswith("image_features/") and name.endswith(".tar") for name in expected) == NUM_SHARDS
    )
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    # in S3 alone
    assert not list((place.folder / "runs/cut").glob("[ijc]*/*.tar"))


def test_the_training_went_on_from_its_checkpoint_exactly(place: Deployment, cut: str):
    """Weights and averages at every checkpoint, the optimizer's state at the last two, and the loss of every
    step as MLflow has it.
    """
    pairs = list(zip(place.checkpoints("calm"), place.checkpoints("cut"), strict=True))
    assert [step_of(one) for one, _ in pairs] == list(range(EVERY, STEPS + 1, EVERY))
    for one, other in pairs:
        names = {str(path.relative_to(one)) for path in one.rglob("*.safetensors")}
        # of generators that nothing draws from, which begin elsewhere in each process
        names -= {name for name in names if name.startswith("resume/rng_")}
        assert {"model.safetensors", "ema.safetensors"} <= names
        different = [name for name in names if file_sha256(one / name) != file_sha256(other / name)]
        assert different == [], f"{other}: {different}"
    losses = []
    for name in ("calm", "cut"):
        run = json.loads((place.folder / "runs" / name / "train/train.json").read_text())
        losses.append(set(metric_history(place.mlflow, run["run_id"], "train/loss")))
    assert {step for step, _ in losses[0]} == {*range(1, STEPS + 1)} and losses[0] == losses[1]


def test_the_lock_of_the_data_says_which_job_had_it(place: Deployment, cut: str):
    (name,) = [one for one in place.data("cut").names() if one.startswith(".image_features.")]
    lock = json.loads(place.data("cut").read(name))
    job = cut.split("submitted ")[1].split()[0]
    assert lock["holder"]["job"] == job and lock["is_free"]


def test_a_wrong_token_is_refused(place: Deployment):
    right = place.token.read_text()
    place.token.write_text("0" * 64)
    try:
        assert "refuses the token" in place.cluster("jobs", code=1)
    finally:
        place.token.write_text(right)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    said = place.run(
        *("pipelines", "run", "flow.yaml", "root=runs/intruder", "last_stage=ingest"),
        f"ray.address={place.record.address}",
        code=1,
        **given,
    )
    assert "error: cannot join the Ray cluster" in said and "Traceback" not in said
    assert "has no jobs" in (found := place.cluster("jobs")) or "SUCCEEDED" in found


def test_a_wrong_password_is_refused(place: Deployment):
    address = f"{place.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"

    def status(password: str | None) -> int:
        pair = b64encode(f"tracker:{password}".encode()).decode()
        headers = {} if password is None else {"Authorization": f"Basic {pair}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(one) for one in (SECRETS["mlflow"], "wrong", None)] == [200, 401, 401]
    code = "import sys; from repfusion.tracking import prepare_store; prepare_store(sys.argv[1], 'mine')"
    done = subprocess.run(
        [sys.executable, "-c", code, place.mlflow],
        env={**os.environ, "MLFLOW_TRACKING_PASSWORD": "wrong", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "StoreError" in done.stderr and "401" in done.stderr, done.stderr


def stored_rows(dsn: str) -> bytes:
    """Every row of MLflow's database."""
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        rows: list[str] = []
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT "{table}"::text FROM "{table}"')
            rows += [row for (row,) in cursor.fetchall()]
    connection.close()
    return "\n".join(rows).encode()


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()


def objects(place: Deployment) -> Iterator[tuple[str, bytes]]:
    client: Any = boto3.client("s3", endpoint_url=place.s3)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for one in page["Contents"]:
            yield one["Key"], client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read()


def table_of_jobs(place: Deployment) -> bytes:
    headers = {"Authorization": f"Bearer {place.token.read_text().strip()}"}
    request = urllib.request.Request(f"{place.record.jobs_address}/api/jobs/", headers=headers)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_planted_secrets_are_found_nowhere(place: Deployment, cut: str):
    secrets = {**SECRETS, "token": place.token.read_text().strip()}

    def leaks(data: bytes) -> list[str]:
        return [name for name, secret in secrets.items() if secret.encode() in data]

    rows, jobs = stored_rows(place.dsn), table_of_jobs(place)
    said = {"MLflow's database": rows, "the table of jobs": jobs, "the log of a job": cut.encode()}
    said["command lines"] = "\n".join(place.commands).encode()
    written = {name: data for name, data in files_below(place.folder) if Path(name) != place.token}
    of_ray = dict(files_below(Path(place.record.ray_folder)))
    stored = dict(objects(place))
    found = {name: leaks(data) for name, data in {**said, **written, **of_ray, **stored}.items()}
    assert {name: one for name, one in found.items() if one} == {}
    # and it was looked at the right places
    assert b"train/loss" in rows and b"runs/cut" in jobs
    assert any("-m pipelines run" in command for command in place.commands)
    assert any("mlflow" in command and "basic-auth" in command for command in place.commands)
    assert any(name.endswith("config.json") for name in written) and any("log" in name for name in of_ray)
    assert any(name.startswith("artifacts/") for name in stored)
    assert place.token.stat().st_mode & 0o777 == 0o600


def test_down_leaves_nothing_that_runs(place: Deployment, cut: str):
    mark = place.record.mark
    said = place.cluster("down")
    assert "none left" in said and processes.marked(mark) == {}
    assert not place.token.exists()
