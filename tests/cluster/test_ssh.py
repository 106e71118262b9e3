"""Kind `ssh` with this machine as every host: a script stands for ssh, `ray start` is a process that stays,
the Jobs API a server that asks for the token. Marks, tokens, tunnels and what is said are the real ones.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from cluster.kinds import processes
from cluster.record import read_record

ROOT = Path(__file__).parents[2]
SSH = """#!/bin/sh
if [ "$1" = -N ]; then exec {python} forward.py "$3"; fi
echo "$*" >> calls
[ "$1" = nowhere ] && echo "ssh: no route to host" >&2 && exit 255
exec sh -c "$2"
"""
FORWARD = """
import socket, sys, threading

near, host, far = sys.argv[1].split(":")
server = socket.create_server(("127.0.0.1", int(near)))

def copy(one, other):
    try:
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        one.close()
        other.close()

while True:
    client = server.accept()[0]
    try:
        there = socket.create_connection((host, int(far)))
    except OSError:
        client.close()
        continue
    for pair in ((client, there), (there, client)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""
RAY = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

options = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
if "--head" not in sys.argv:
    time.sleep(600)
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()

class Api(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers.get("Authorization") == "Bearer " + token
        version = {"version": "4", "ray_version": "VERSION", "ray_commit": "", "session_name": ""}
        answer = json.dumps(version if "version" in self.path else []).encode() if known else b"Unauthorized"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(answer)

ThreadingHTTPServer(("127.0.0.1", int(options["dashboard-port"])), Api).serve_forever()
"""


@pytest.fixture(autouse=True)
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's folder, the project's folder on the hosts, a cluster of three; all is gone in the end."""
    project = tmp_path / "project"
    (tmp_path / "forward.py").write_text(FORWARD)
    (tmp_path / "start.py").write_text(RAY.replace("VERSION", ray.__version__))
    own = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n'
    start = f'#!/bin/sh\nexec {sys.executable} {tmp_path}/start.py "$@"\n'
    scripts = {
        tmp_path / "ssh": SSH.format(python=sys.executable),
        project / ".venv/bin/python": own,
        project / ".venv/bin/ray": start,
    }
    for path, text in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (jobs_port,) = processes.ports_of({"jobs_port": None})
    values = {
        "kind": "ssh",
        "folder": str(project),
        "head": {"host": "one", "num_cpus": 0},
        "workers": {"gpu": {"hosts": ["two", "three"]}},
        "connect": [str(tmp_path / "ssh")],
        "jobs_port": jobs_port,
    }
    (tmp_path / "room.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    yield
    if (record := read_record("room")) is not None:
        processes.end_rest(record.mark)


def run(command: str, code: int = 0) -> str:
    """What a command says, in a process of its own: Ray reads token and mode once a process."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", command, "--cluster", "room.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_hosts_are_started_seen_and_ended():
    assert "room: started head, gpu-0, gpu-1; head one:6379" in run("up")
    record = read_record("room")
    assert record is not None and [one.host for one in record.nodes] == ["one", "two", "three"]
    assert "is up already" in run("up")
    assert run("status").count("alive") == 3
    assert "room has no jobs yet" in run("jobs")

    token = Path("runs/clusters/room/token").read_text()
    placed = Path("project/runs/clusters/room/ray-token")
    assert placed.read_text() == token and placed.stat().st_mode & 0o777 == 0o600
    shown = " ".join(processes.marked(record.mark).values())
    assert "--block" in shown and token not in shown + Path("calls").read_text()
    own = Path("runs/clusters/room/token")
    own.write_text("0" * 64)
    assert "room refuses the token" in run("jobs", code=1)
    own.write_text(token)

    os.kill(record.nodes[1].pid, signal.SIGKILL)
    assert processes.wait_until(lambda: len(processes.marked(record.mark)) == 2, 10)
    assert "gpu-0        two                  dead" in run("status", code=1)
    assert "room: started gpu-0;" in run("up")
    assert len(processes.marked(record.mark)) == 3

    assert "room is down on 3 hosts, nothing left" in run("down")
    assert processes.marked(record.mark) == {} and read_record("room") is None
    assert "nothing to end" in run("down")


def test_a_host_that_is_not_reached_is_named_and_the_others_are_ended():
    values = yaml.safe_load(Path("room.yaml").read_text())
    values["workers"]["gpu"]["hosts"] = ["nowhere"]
    Path("room.yaml").write_text(yaml.safe_dump(values))
    assert "nowhere could not be reached, or failed: ssh: no route to host" in run("up", code=1)
    record = read_record("room")
    assert record is not None and len(processes.marked(record.mark)) == 1
    assert "room is down on 1 hosts" in run("down")
    assert processes.marked(record.mark) == {}
