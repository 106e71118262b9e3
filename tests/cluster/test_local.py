"""A real cluster of processes on this machine, through the command line: the way of a user."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from killing import LOOPBACK, contents, differences, listening_addresses

from cluster.kinds import processes
from cluster.record import ClusterRecord, read_record
from cluster.submission import commit

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow]
WORKFLOW = {
    "root": "runs/tiny",
    "last_stage": "curate",
    "source": {"kind": "scenes", "num_samples": 20, "shard_size": 10},
    "ray": {"num_cpus": 2, "object_store_mib": 80},
}


class Commands:
    """`python -m cluster` and `python -m pipelines` in a folder of their own."""

    def __init__(self, folder: Path, **cluster: object):
        self.folder = folder
        (folder / "tiny.yaml").write_text(yaml.safe_dump(WORKFLOW))
        (folder / "two.yaml").write_text(
            yaml.safe_dump({"kind": "local", "workers": {"cpu": {"count": 2}}, "stop_sec": 60, **cluster})
        )

    def run(self, *words: str, code: int = 0) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def cluster(self, *words: str, code: int = 0) -> str:
        return self.run("cluster", *words, "--cluster", "two.yaml", code=code)

    def record(self) -> ClusterRecord:
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            record = read_record("two")
        finally:
            os.chdir(before)
        assert record is not None
        return record


def commands_of(folder: Path, **cluster: object):
    commands = Commands(folder, **cluster)
    try:
        yield commands
    finally:
        if (folder / "runs/clusters/two/cluster.json").is_file():
            mark = commands.record().mark
            subprocess.run(
                [sys.executable, "-m", "cluster", "down", "--cluster", "two.yaml"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )
            processes.end_rest(mark)


@pytest.fixture
def commands(tmp_path: Path):
    yield from commands_of(tmp_path)


@pytest.fixture
def guarded(tmp_path: Path):
    yield from commands_of(tmp_path, token=True)


def submitted(said: str) -> str:
    """The name of the job that was submitted."""
    return said.split("submitted ")[1].split()[0]


def test_a_workflow_runs_on_a_cluster_as_it_does_without_one(commands):
    commands.run("pipelines", "run", "tiny.yaml", "root=runs/here")
    assert "two is up: 2 workers" in commands.cluster("up")
    record = commands.record()
    alive = processes.marked(record.mark)
    assert listening_addresses(list(alive)) <= LOOPBACK

    assert "two is up already" in commands.cluster("up")
    assert {one.pid for one in commands.record().nodes} == {one.pid for one in record.nodes}
    assert "two has no jobs yet" in commands.cluster("jobs")

    head = commit()
    said = commands.cluster("submit", "tiny.yaml", "root=runs/there", "--follow")
    assert "curate: 2 shards, 20 samples" in said and ": SUCCEEDED" in said
    assert (
        differences(contents(commands.folder / "runs/here"), contents(commands.folder / "runs/there")) == []
    )
    assert f" {head[:12]}" in commands.cluster("jobs")
    said = commands.cluster("submit", "tiny.yaml", "root=runs/there")
    assert "nothing to do: all 4 stages of tiny.yaml are fresh" in said

    job = submitted(commands.cluster("submit", "tiny.yaml", "root=runs/cut"))
    assert f"is at work already: job {job}" in commands.cluster("submit", "tiny.yaml", "root=runs/cut")
    assert f"{job}: STOPPED" in commands.cluster("cancel", job)
    assert "stopped by SIGTERM" in commands.cluster("logs", job)
    assert f"{job}: was over already, STOPPED" in commands.cluster("cancel", job)
    assert "there are:" in commands.cluster("logs", "nosuch", code=1)

    said = commands.cluster("down")
    assert "none left" in said and "had to be killed" not in said
    assert processes.marked(record.mark) == {}
    assert not Path(record.ray_folder).exists()
    assert (commands.folder / f"runs/clusters/two/logs/job-driver-{job}.log").is_file()


def test_a_dead_worker_is_told_and_started_again(commands):
    commands.cluster("up")
    before = {one.name: one.pid for one in commands.record().nodes}
    os.killpg(before["cpu-0"], signal.SIGKILL)
    said = commands.cluster("status", code=1)
    assert "cpu-0        dead" in said and "cpu-1        alive  1 CPU" in said
    assert "two has cpu-0 again" in commands.cluster("up")
    after = {one.name: one.pid for one in commands.record().nodes}
    assert after["cpu-0"] != before["cpu-0"] and after["cpu-1"] == before["cpu-1"]
    assert "dead" not in commands.cluster("status")


def test_a_wrong_token_is_refused(guarded):
    guarded.cluster("up")
    token = guarded.folder / "runs/clusters/two/token"
    assert token.stat().st_mode & 0o777 == 0o600
    secret = token.read_text()
    shown = " ".join(processes.marked(guarded.record().mark).values())
    assert secret not in shown + guarded.cluster("status")
    token.write_text("0" * 64)
    assert "refuses the token" in guarded.cluster("jobs", code=1)
    token.write_text(secret)
    assert "two has no jobs yet" in guarded.cluster("jobs")
