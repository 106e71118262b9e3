"""What the commands say where nothing is up, or what is up is dead; no Ray is started here."""

import importlib.util
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.commands import main
from cluster.config import ClusterError
from cluster.kinds import processes
from cluster.kinds.nodes import LocalCluster, LocalNodes
from cluster.record import ClusterRecord, NodeRecord, folder_of, new_mark, read_record, write_record


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ends(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def sleeping():
    """A record whose head and one worker are alive; all that carries its mark is gone in the end."""
    mark = new_mark("local2")
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    environment = {**os.environ, processes.MARK: mark}
    nodes = [
        NodeRecord(
            name=name, group=name, pid=processes.start(words, environment, Path(f"{name}.log")), log="-"
        )
        for name in ("head", "cpu-0")
    ]
    folder = Path("ray")
    folder.mkdir()
    record = ClusterRecord(
        name="local2",
        mark=mark,
        address="127.0.0.1:1",
        jobs_address="http://127.0.0.1:1",
        ray_folder=str(folder),
        started=time.time(),
        nodes=nodes,
    )
    assert processes.wait_until(lambda: len(processes.marked(mark)) == 2, 10)
    write_record(record)
    yield record
    processes.end_rest(mark)


@pytest.mark.parametrize("words", [("status",), ("jobs",), ("logs", "j"), ("cancel", "j")])
def test_what_is_not_up_says_how_to_start_it(words, capsys):
    code, _, error = ends(capsys, *words, "--cluster", "local2")
    assert code == 1 and error == "error: local2 is not up: make cluster-up CLUSTER=local2\n"


@pytest.mark.parametrize(("command", "meant"), [("submit", "W="), ("logs", "JOB="), ("cancel", "JOB=")])
def test_what_a_command_needs_is_said(command, meant, capsys):
    code, _, error = ends(capsys, command, "--cluster", "local2")
    assert code == 1 and meant in error


def test_down_of_what_is_not_up_is_no_error(capsys):
    code, said, _ = ends(capsys, "down", "--cluster", "local2")
    assert code == 0 and "nothing to end" in said


def test_down_ends_what_carries_the_mark_and_nothing_else(sleeping, capsys):
    other = processes.start(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        {**os.environ, processes.MARK: sleeping.mark + "x"},
        Path("other.log"),
    )
    try:
        # a grandchild that lost its parents, as a job's process would be
        child = processes.start(
            ["sh", "-c", "sleep 600 & exit"], {**os.environ, processes.MARK: sleeping.mark}, Path("child.log")
        )
        assert processes.wait_until(lambda: not processes.is_alive(child, sleeping.mark), 10)
        assert len(processes.marked(sleeping.mark)) == 3
        code, said, _ = ends(capsys, "down", "--cluster", "local2")
        assert code == 0 and "3 processes ended, none left" in said and "sleep 600" in said
        assert processes.marked(sleeping.mark) == {}
        assert not Path(sleeping.ray_folder).exists() and read_record("local2") is None
        assert processes.is_alive(other, sleeping.mark + "x")
    finally:
        processes.end_rest(sleeping.mark + "x")


def test_a_dead_head_is_named_by_every_command(sleeping, capsys):
    os.kill(sleeping.nodes[0].pid, signal.SIGKILL)
    assert processes.wait_until(lambda: len(processes.marked(sleeping.mark)) == 1, 10)
    for command in ("up", "status", "jobs"):
        code, _, error = ends(capsys, command, "--cluster", "local2")
        assert code == 1 and f"the head of local2 (pid {sleeping.nodes[0].pid}) is gone" in error
        assert "make cluster-down CLUSTER=local2" in error
    assert ends(capsys, "down", "--cluster", "local2")[0] == 0


def test_a_number_that_another_process_has_now_is_not_taken_for_the_head():
    record = ClusterRecord(
        name="local2",
        mark=new_mark("local2"),
        address="-",
        jobs_address="-",
        ray_folder="ray",
        started=0,
        nodes=[NodeRecord(name="head", group="head", pid=os.getpid(), log="-")],
    )
    assert not LocalNodes("local2", LocalCluster()).lives(record, "head")


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=f"jobs_port: port {port} of 127.0.0.1 is taken"):
            processes.ports_of({"port": None, "jobs_port": port})
    assert processes.ports_of({"port": port}) == [port]
    with pytest.raises(ClusterError, match=f"jobs_port: port {port}"):
        processes.ports_of({"port": port, "jobs_port": port})


def test_free_ports_differ():
    # asked for one after the other, the kernel gives the same port now and then
    for _ in range(200):
        assert len(set(processes.ports_of({"a": None, "b": None, "c": None}))) == 3


def test_a_record_that_is_none_is_an_error_with_its_path(capsys):
    folder_of("local2").mkdir(parents=True)
    (folder_of("local2") / "cluster.json").write_text('{"name": 3}')
    code, _, error = ends(capsys, "status", "--cluster", "local2")
    assert code == 1 and "runs/clusters/local2/cluster.json is no record of a cluster" in error


def test_a_head_that_ends_at_once_shows_its_last_words():
    nodes = LocalNodes("local2", LocalCluster())
    log = Path("head.log")
    pid = processes.start(["sh", "-c", "echo last words"], os.environ, log)
    record = ClusterRecord(
        name="local2",
        mark="local2-none",
        address="-",
        jobs_address="-",
        ray_folder="ray",
        started=0,
        nodes=[NodeRecord(name="head", group="head", pid=pid, log=str(log))],
    )
    processes.wait_until(lambda: "last" in log.read_text(), 10)
    with pytest.raises(
        ClusterError, match=r"head of local2 ended at once; head\.log ends with\n +last words"
    ):
        nodes.wait_for(record, "head", lambda: False)


def test_a_workflow_with_a_typo_is_refused_before_anything_is_submitted(sleeping, capsys):
    Path("wrong.yaml").write_text("root: runs/wrong\nlast_stagge: ingest\n")
    code, _, error = ends(capsys, "submit", "wrong.yaml", "--cluster", "local2")
    assert code == 1 and "unknown key 'last_stagge'; did you mean 'last_stage'?" in error


def test_an_override_with_a_secret_is_refused_and_not_shown(sleeping, capsys):
    Path("small.yaml").write_text(yaml.safe_dump({"root": "runs/small", "last_stage": "ingest"}))
    words = ("submit", "small.yaml", "trainings.train.tracking.uri=postgresql://me:planted@host/db")
    code, said, error = ends(capsys, *words, "--cluster", "local2")
    assert code == 1 and "the table of jobs would show its secret" in error and "oc.env:" in error
    assert "planted" not in said + error


def test_a_jobs_api_that_does_not_answer_is_named(sleeping, capsys):
    code, _, error = ends(capsys, "jobs", "--cluster", "local2")
    assert code == 1 and "no Jobs API of local2 answers at http://127.0.0.1:1" in error


def test_a_ray_without_its_jobs_api_is_named_before_anything_starts(capsys, monkeypatch):
    found = importlib.util.find_spec
    without = lambda name, *rest: None if name == "aiohttp_cors" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, _, error = ends(capsys, "up", "--cluster", "local2")
    assert code == 1 and "aiohttp_cors" in error and "pip install 'ray[default]==2.60" in error
    assert read_record("local2") is None


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="SLURM is here")
def test_slurm_that_is_not_here_is_named(capsys):
    code, _, error = ends(capsys, "up", "--cluster", "slurm")
    assert code == 1 and "sinfo is not on this machine" in error
