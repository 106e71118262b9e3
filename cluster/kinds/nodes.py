"""The nodes of kind `local`: `ray start` as processes on loopback, with ports and a folder of their own."""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field

from cluster.config import BaseCluster, ClusterError, NodeConfig, option_words
from cluster.jobs import authentication
from cluster.kinds import processes
from cluster.record import ClusterRecord, NodeRecord, folder_of, new_mark, token_file, write_record
from cluster.submission import PROJECT
from pipelines.runtime.session import RayConfig, StageError, ray_session

START_SEC = 120.0
"""Patience with a node that starts."""
TRIES = 3
"""Starts of a worker that ends before Ray knows it."""
DRAIN_SEC = 45.0
"""Patience with a node that ends: Ray gives the work on it 30 s."""
JOBS_API_NEEDS = ("aiohttp_cors", "grpc", "opencensus", "prometheus_client")
"""Packages of ray[default] without which the head serves no Jobs API."""
GROUP, NODE = "repfusion-group", "repfusion-node"
"""Labels of Ray's nodes by which they are told apart."""
HIDDEN = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"}
"""Variables of a user that belong to other clusters."""
NODE_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
"""Variables of a node where the user's environment says nothing else."""


class LocalGroup(NodeConfig):
    """Workers as processes on this machine."""

    count: int = Field(default=1, ge=0)
    """How many."""
    num_cpus: int | None = Field(default=1, ge=0)
    """Logical CPUs of each."""
    num_gpus: int | None = Field(default=0, ge=0)
    """Logical GPUs of each."""
    object_store_mib: int | None = Field(default=100, ge=80)
    """Shared memory of each."""


class LocalHead(LocalGroup):
    """The head, a process on this machine."""

    count: Literal[1] = 1
    num_cpus: int | None = Field(default=0, ge=0)


class LocalCluster(BaseCluster):
    """A head and workers as processes on this machine, on loopback alone."""

    kind: Literal["local"] = "local"
    head: LocalHead = LocalHead()
    """The head; without CPUs it runs the jobs' drivers and no stage."""
    workers: dict[str, LocalGroup] = {"cpu": LocalGroup(count=2)}
    """Groups of workers by name."""
    port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the head; None takes a free one."""
    jobs_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the Jobs API (Ray's dashboard); None takes a free one."""
    token: bool = False
    """Whether Ray asks for a token: on loopback it need not."""


@dataclass(frozen=True)
class LocalNodes:
    """The processes of one cluster. Each change is recorded before anything waits, so that `end` finds it."""

    name: str
    config: LocalCluster

    @property
    def token(self) -> Path | None:
        """File of the token, made where there is none; None where Ray asks for none."""
        return token_file(self.name) if self.config.token else None

    @property
    def wanted(self) -> dict[str, tuple[str, NodeConfig]]:
        """Every node by name: its group, and what Ray is to see of it."""
        workers = {
            f"{group}-{index}": (group, one)
            for group, one in self.config.workers.items()
            for index in range(one.count)
        }
        return {"head": ("head", self.config.head), **workers}

    def start_head(self) -> ClusterRecord:
        """Waits until the head answers.

        Raises:
            ClusterError: a port is taken, Ray lacks its Jobs API, or the head ends.
        """
        need_jobs_api()
        wanted = {"port": self.config.port, "jobs_port": self.config.jobs_port}
        port, jobs_port = processes.ports_of(wanted)
        record = ClusterRecord(
            name=self.name,
            mark=new_mark(self.name),
            address=f"127.0.0.1:{port}",
            jobs_address=f"http://127.0.0.1:{jobs_port}",
            # short, as the names of Ray's sockets may have 107 letters
            ray_folder=tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
            started=time.time(),
        )
        write_record(record)
        serves = {
            "port": str(port),
            "temp-dir": record.ray_folder,
            "include-dashboard": "true",
            "dashboard-host": "127.0.0.1",
            "dashboard-port": str(jobs_port),
        }
        record = self.start(record, "head", serves)
        self.wait_for(record, "head", lambda: processes.answers(port))
        return record

    def start_worker(self, record: ClusterRecord, name: str) -> ClusterRecord:
        """Does not wait."""
        return self.start(record, name, {"address": record.address})

    def start(self, record: ClusterRecord, name: str, options: dict[str, str]) -> ClusterRecord:
        """Starts a node with further options of `ray start`."""
        group, node = self.wanted[name]
        shared = {
            "node-ip-address": "127.0.0.1",
            # nodes of one machine cannot all have Ray's usual range
            "min-worker-port": "0",
            "max-worker-port": "0",
            "dashboard-agent-listen-port": "0",
            **node.start_options(**{GROUP: group, NODE: name}),
            **options,
        }
        flags = [*(["--head"] if name == "head" else []), "--block", "--disable-usage-stats"]
        words = [sys.executable, "-m", "cluster.kinds.node", "start", *option_words(shared), *flags]
        log = folder_of(self.name) / "logs" / f"{name}.log"
        pid = processes.start(words, self._environment(record), log)
        record = record.with_node(NodeRecord(name=name, group=group, pid=pid, log=str(log)))
        write_record(record)
        return record

    def _environment(self, record: ClusterRecord) -> dict[str, str]:
        """Variables of the nodes, and so of every job and worker: the user's, with what Ray and the code
        need.
        """
        path = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {key: value for key, value in os.environ.items() if key not in HIDDEN}
        token = self.token
        return {
            **NODE_DEFAULTS,
            **given,
            processes.MARK: record.mark,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "RAY_AUTH_MODE": "disabled" if token is None else "token",
            **({} if token is None else {"RAY_AUTH_TOKEN_PATH": str(token)}),
        }

    def lives(self, record: ClusterRecord, name: str) -> bool:
        """Whether the process of a node is alive."""
        pids = [one.pid for one in record.nodes if one.name == name]
        return bool(pids) and processes.is_alive(pids[0], record.mark)

    def wait_for(self, record: ClusterRecord, name: str, condition: Callable[[], bool]) -> None:
        """Raises ClusterError where the node's process ends, or nothing comes of it in time."""
        processes.wait_until(lambda: condition() or not self.lives(record, name), START_SEC)
        if not (self.lives(record, name) and condition()):
            log = next(Path(one.log) for one in record.nodes if one.name == name)
            state = "takes too long" if self.lives(record, name) else "ended at once"
            raise ClusterError(
                f"{name} of {self.name} {state}; {log} ends with\n{processes.tail(log)}\n"
                f"make cluster-down CLUSTER={self.name} ends what was started"
            )

    def wait_for_all(self, record: ClusterRecord) -> None:
        """Waits until Ray knows every node, and its Jobs API answers.

        Raises:
            ClusterError: one of them ended, or takes too long.
        """
        with self.session(record, START_SEC):
            for name in self.wanted:
                record = self._wait_until_known(record, name)
        port = int(record.jobs_address.rpartition(":")[2])
        self.wait_for(record, "head", lambda: processes.answers(port))

    def _wait_until_known(self, record: ClusterRecord, name: str, tries: int = TRIES) -> ClusterRecord:
        """A worker that ends meanwhile is started again, now alone: Ray gives a node 30 s to start, which is
        little where all of them share a busy machine.
        """
        processes.wait_until(lambda: name in seen() or not self.lives(record, name), START_SEC)
        if name != "head" and tries > 1 and not self.lives(record, name):
            return self._wait_until_known(self.start_worker(record, name), name, tries - 1)
        self.wait_for(record, name, lambda: name in seen())
        return record

    @contextmanager
    def session(self, record: ClusterRecord, patience_sec: float = 0.0) -> Iterator[None]:
        """A session of Ray on the cluster. A head that has just started may let nobody in yet: it is asked
        again for `patience_sec`.

        Raises:
            ClusterError: it lets nobody in.
        """
        start = time.monotonic()
        with authentication(self.token), ExitStack() as joined:
            while True:
                try:
                    joined.enter_context(ray_session(RayConfig(address=record.address)))
                    break
                except StageError as error:
                    if time.monotonic() - start > patience_sec or not self.lives(record, "head"):
                        raise ClusterError(f"{self.name}: {error}") from error
            yield

    def end(self, record: ClusterRecord) -> tuple[int, dict[int, str]]:
        """Ends every process, workers first, and removes Ray's folder; what the jobs said stays.

        Returns:
            how many there were, and those that had to be killed: pid -> command.
        """
        number = len(processes.marked(record.mark))
        workers = [one.pid for one in record.nodes if one.name != "head"]
        processes.ask_to_end(workers, record.mark, DRAIN_SEC)
        processes.ask_to_end([one.pid for one in record.nodes], record.mark, DRAIN_SEC)
        killed = processes.end_rest(record.mark, processes.HELPERS_SEC)
        for log in Path(record.ray_folder).glob("session_*/logs/job-driver-*.log"):
            if not log.parent.parent.is_symlink():
                shutil.copyfile(log, folder_of(self.name) / "logs" / log.name)
        shutil.rmtree(record.ray_folder, ignore_errors=True)
        return number, killed


def seen() -> dict[str, dict[str, float]]:
    """Resources of the nodes that Ray knows to be alive, by name, within a session."""
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"])
    return {node.get("Labels", {}).get(NODE, "?"): node["Resources"] for node in nodes}


def need_jobs_api() -> None:
    """Raises ClusterError where Ray is installed without what serves its Jobs API."""
    if missing := [name for name in JOBS_API_NEEDS if importlib.util.find_spec(name) is None]:
        raise ClusterError(
            f"Ray serves its Jobs API only with ray[default], and {', '.join(missing)} of it cannot be "
            f"imported here; {sys.executable} -m pip install 'ray[default]=={version('ray')}'"
        )
