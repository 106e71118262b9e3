"""Kind `local`: a head and workers as processes on this machine, for trying the whole out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config import ClusterError
from cluster.jobs import RayJobs, ray_jobs
from cluster.kinds import processes
from cluster.kinds.nodes import LocalCluster, LocalNodes, seen
from cluster.kinds.submitting import JobsLauncher, in_place
from cluster.record import ClusterRecord, folder_of, forget, read_record, since


class Local(JobsLauncher):
    """A cluster on this machine."""

    def __init__(self, name: str, config: LocalCluster):
        super().__init__(name, config)
        self.config = config
        self.nodes = LocalNodes(name, config)

    def up(self) -> None:
        record = read_record(self.name)
        said = "is up" if record is None else "is up already"
        if record is None:
            record = self.nodes.start_head()
        elif not self.nodes.lives(record, "head"):
            raise ClusterError(f"{self._dead_head(record)}; then make cluster-up CLUSTER={self.name}")
        missing = [name for name in self.nodes.wanted if not self.nodes.lives(record, name)]
        for name in missing:
            record = self.nodes.start_worker(record, name)
        self.nodes.wait_for_all(record)
        said = f"has {', '.join(missing)} again" if missing and said == "is up already" else said
        print(f"{self.name} {said}: {len(self.nodes.wanted) - 1} workers, head {record.address}")
        print(f"  jobs at {record.jobs_address}, logs in {folder_of(self.name)}/logs")

    def status(self) -> bool:
        record = self._living()
        print(f"{self.name}: up for {since(record.started)}, head {record.address}")
        with self.nodes.session(record):
            known = seen()
        alive = {name for name in self.nodes.wanted if name in known and self.nodes.lives(record, name)}
        for name in self.nodes.wanted:
            print(f"  {name:<12} {'alive' if name in alive else 'dead':<6} {_resources(known.get(name, {}))}")
        if missing := [name for name in self.nodes.wanted if name not in alive]:
            print(f"make cluster-up CLUSTER={self.name} starts {', '.join(missing)} again")
        with self.connected() as jobs:
            running = [job for job in jobs.every() if not job.is_over]
        print(f"  jobs at {record.jobs_address}: {len(running)} at work")
        for job in running:
            print(f"  {job.line()}")
        return not missing

    @contextmanager
    def connected(self) -> Iterator[RayJobs]:
        with ray_jobs(self.name, self._living().jobs_address, self.nodes.token) as jobs:
            yield jobs

    def command(self) -> tuple[str, str, dict[str, str]]:
        return in_place(), sys.executable, {"RAY_ADDRESS": self._living().address}

    def down(self) -> None:
        record = read_record(self.name)
        if record is None:
            print(f"{self.name} is not up (no {folder_of(self.name)}/cluster.json): nothing to end")
            return
        if self.nodes.lives(record, "head"):
            self._end_jobs()
        number, killed = self.nodes.end(record)
        for pid, command in killed.items():
            print(f"  had to be killed: {pid} {command[:100]}")
        if left := processes.marked(record.mark):
            named = "; ".join(f"{pid} {command[:80]}" for pid, command in left.items())
            raise ClusterError(f"{self.name}: still alive: {named}; run make cluster-down again")
        forget(self.name)
        print(f"{self.name} is down: {number} processes ended, none left")
        print(f"  logs in {folder_of(self.name)}/logs")

    def _end_jobs(self) -> None:
        """So that a training writes its checkpoint before its nodes go."""
        try:
            with self.connected() as jobs:
                for job in (one for one in jobs.every() if not one.is_over):
                    print(f"ending job {job.name}")
                    jobs.cancel(job.name, self.config.stop_sec)
        except ClusterError as error:
            print(f"jobs could not be asked to end: {error}")

    def _living(self) -> ClusterRecord:
        """The record of a cluster whose head is alive."""
        if (record := read_record(self.name)) is None:
            raise ClusterError(f"{self.name} is not up: make cluster-up CLUSTER={self.name}")
        if not self.nodes.lives(record, "head"):
            raise ClusterError(self._dead_head(record))
        return record

    def _dead_head(self, record: ClusterRecord) -> str:
        head = next((one for one in record.nodes if one.name == "head"), None)
        where = (
            "never started" if head is None else f"(pid {head.pid}) is gone; {head.log} has its last words"
        )
        return f"the head of {self.name} {where}: make cluster-down CLUSTER={self.name} ends what is left"


def _resources(found: dict[str, float]) -> str:
    shown = {"CPU": found.get("CPU", 0.0), **({"GPU": found["GPU"]} if "GPU" in found else {})}
    return ", ".join(f"{value:g} {name}" for name, value in shown.items())
