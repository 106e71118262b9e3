"""Kind `ssh`: machines that are reached by ssh, each with the project at the same place."""

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import Field, model_validator

from cluster.config import BaseCluster, ClusterError, NodeConfig, option_words
from cluster.jobs import RayJobs, ray_jobs
from cluster.kinds import processes
from cluster.kinds.forwarding import forwarded
from cluster.kinds.submitting import JobsLauncher
from cluster.record import (
    ClusterRecord,
    NodeRecord,
    folder_of,
    forget,
    new_mark,
    read_record,
    since,
    token_file,
    write_record,
)

START_SEC = 120.0


class SshHead(NodeConfig):
    """The host of the head."""

    host: str
    """Name or address, as the other hosts reach it."""


class SshGroup(NodeConfig):
    """Hosts of one sort."""

    hosts: list[str] = Field(min_length=1)
    """Names or addresses."""


class SshCluster(BaseCluster):
    """Machines that are reached by ssh."""

    kind: Literal["ssh"]
    head: SshHead
    workers: dict[str, SshGroup] = {}
    """Groups of workers by name."""
    folder: str
    """The project's folder on every host; relative paths of workflows start there."""
    python: str = ".venv/bin/python"
    """On every host, relative to `folder`."""
    port: int = Field(default=6379, ge=1024, le=65535)
    """Port of the head."""
    jobs_port: int = Field(default=8265, ge=1024, le=65535)
    """Port of the Jobs API, on the head's loopback: it is reached through ssh."""
    connect: list[str] = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    """The command that takes a host and a line of shell, and `-N -L PORT:HOST:PORT` before the host."""
    token: bool = True
    """Whether Ray asks for a token; it is placed on every host."""

    @model_validator(mode="after")
    def _a_host_has_one_node(self) -> "SshCluster":
        hosts = [self.head.host, *(host for group in self.workers.values() for host in group.hosts)]
        if twice := sorted({host for host in hosts if hosts.count(host) > 1}):
            raise ValueError(f"{', '.join(twice)}: a host is one node of Ray; it stands here more than once")
        return self


class Ssh(JobsLauncher):
    """A cluster of hosts."""

    def __init__(self, name: str, config: SshCluster):
        super().__init__(name, config)
        self.config = config

    @property
    def wanted(self) -> dict[str, tuple[str, str, NodeConfig]]:
        """Every node by name: its group, its host, and what Ray is to see of it."""
        workers = {
            f"{group}-{index}": (group, host, one)
            for group, one in self.config.workers.items()
            for index, host in enumerate(one.hosts)
        }
        return {"head": ("head", self.config.head.host, self.config.head), **workers}

    def up(self) -> None:
        record = read_record(self.name) or self._new_record()
        missing = [name for name, pid in self._alive(record).items() if pid is None]
        if "head" in missing and record.nodes:
            raise ClusterError(
                f"the head of {self.name} is gone: make cluster-down CLUSTER={self.name} first"
            )
        for name in missing:
            record = self._start(record, name)
        self._wait(record)
        said = f"started {', '.join(missing)}" if missing else "is up already"
        print(f"{self.name}: {said}; head {record.address}")

    def _new_record(self) -> ClusterRecord:
        record = ClusterRecord(
            name=self.name,
            mark=new_mark(self.name),
            address=f"{self.config.head.host}:{self.config.port}",
            jobs_address=f"http://127.0.0.1:{self.config.jobs_port}",
            ray_folder=f"/tmp/ray-{self.name}",
            started=time.time(),
        )
        write_record(record)
        return record

    def _start(self, record: ClusterRecord, name: str) -> ClusterRecord:
        group, host, node = self.wanted[name]
        if self.config.token:
            self._host(host, "token", self._token_path, text=token_file(self.name).read_text())
        options = {**node.start_options(), **self._place(name, record)}
        flags = [*(["--head"] if name == "head" else []), "--block", "--disable-usage-stats"]
        ray = str(self.config.python).removesuffix("python") + "ray"
        log = str(folder_of(self.name) / "logs" / f"{name}.log")
        words = ["env", *self._variables(), ray, "start", *option_words(options), *flags]
        pid = int(self._host(host, "start", record.mark, log, "--", *words))
        record = record.with_node(NodeRecord(name=name, group=group, pid=pid, host=host, log=log))
        write_record(record)
        return record

    def _place(self, name: str, record: ClusterRecord) -> dict[str, str]:
        if name != "head":
            return {"address": record.address}
        return {
            "port": str(self.config.port),
            "temp-dir": record.ray_folder,
            "include-dashboard": "true",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": str(self.config.jobs_port),
        }

    @property
    def _token_path(self) -> str:
        return f"{self.config.folder.rstrip('/')}/{folder_of(self.name)}/ray-token"

    def _variables(self) -> list[str]:
        mode = "token" if self.config.token else "disabled"
        values = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONPATH": self.config.folder,
            "RAY_AUTH_MODE": mode,
            **({"RAY_AUTH_TOKEN_PATH": self._token_path} if self.config.token else {}),
        }
        return [f"{key}={value}" for key, value in values.items()]

    def _wait(self, record: ClusterRecord) -> None:
        """Until every process is still alive once the Jobs API answers."""
        try:
            with self.connected():
                pass
        finally:
            dead = [name for name, pid in self._alive(record).items() if pid is None]
            for name in dead:
                log = next(one for one in record.nodes if one.name == name).log
                print(f"{name} ended at once; see {self.wanted[name][1]}:{self.config.folder}/{log}")
        if dead:
            raise ClusterError(f"{self.name}: {', '.join(dead)} did not start")

    def _alive(self, record: ClusterRecord) -> dict[str, int | None]:
        """The living process of every node, by name."""
        recorded = {one.name: one for one in record.nodes}
        found: dict[str, int | None] = dict.fromkeys(self.wanted)
        for name, one in recorded.items():
            if name in found and str(one.pid) in json.loads(self._host(one.host, "marked", record.mark)):
                found[name] = one.pid
        return found

    def status(self) -> bool:
        record = self._record()
        print(f"{self.name}: started {since(record.started)} ago, head {record.address}")
        alive = self._alive(record)
        for name, pid in alive.items():
            print(
                f"  {name:<12} {self.wanted[name][1]:<20} {'dead' if pid is None else f'alive (pid {pid})'}"
            )
        return None not in alive.values()

    @contextmanager
    def connected(self) -> Iterator[RayJobs]:
        self._record()
        token = token_file(self.name) if self.config.token else None
        with forwarded(self.name, self._tunnel) as address:
            processes.wait_until(lambda: _is_http(address), START_SEC)
            with ray_jobs(self.name, address, token) as jobs:
                yield jobs

    def _tunnel(self, port: int) -> list[str]:
        forward = f"{port}:127.0.0.1:{self.config.jobs_port}"
        return [*self.config.connect, "-N", "-L", forward, self.config.head.host]

    def command(self) -> tuple[str, str, dict[str, str]]:
        return self.config.folder, self.config.python, {"RAY_ADDRESS": self._record().address}

    def down(self) -> None:
        record = read_record(self.name)
        if record is None:
            print(f"{self.name} is not up (no {folder_of(self.name)}/cluster.json): nothing to end")
            return
        hosts = dict.fromkeys(one.host for one in reversed(record.nodes))
        failed = [host for host in hosts if not self._ended(host, record.mark)]
        if failed:
            raise ClusterError(f"{self.name}: {', '.join(failed)} could not be ended; run it again")
        forget(self.name)
        print(f"{self.name} is down on {len(hosts)} hosts, nothing left")

    def _ended(self, host: str, mark: str) -> bool:
        try:
            for pid, command in json.loads(self._host(host, "end", mark)).items():
                print(f"  {host}: had to be killed: {pid} {command[:100]}")
            return not json.loads(self._host(host, "marked", mark))
        except ClusterError as error:
            print(f"  {host}: {error}")
            return False

    def _record(self) -> ClusterRecord:
        if (record := read_record(self.name)) is None:
            raise ClusterError(f"{self.name} is not up: make cluster-up CLUSTER={self.name}")
        return record

    def _host(self, host: str, *words: str, text: str = "") -> str:
        """What cluster/kinds/host.py says on a host. Raises ClusterError where it is not reached or fails."""
        inner = shlex.join([self.config.python, "-m", "cluster.kinds.host", *words])
        command = [*self.config.connect, host, f"cd {shlex.quote(self.config.folder)} && {inner}"]
        try:
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise ClusterError(f"{command[0]} is not on this machine") from error
        if done.returncode:
            raise ClusterError(f"{host} could not be reached, or failed: {done.stderr.strip()[-500:]}")
        return done.stdout


def _is_http(address: str) -> bool:
    """Whether a server answers behind a tunnel, whose own port always listens."""
    import requests

    try:
        requests.get(f"{address}/api/version", timeout=5)
    except requests.RequestException:
        return False
    return True
