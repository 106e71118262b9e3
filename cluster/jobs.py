"""Ray's Jobs API: what is submitted, followed, listed and cancelled on a cluster that is up."""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.config import ClusterError
from cluster.submission import Submission

OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray's client puts in the place of the address that it is given."""


@dataclass(frozen=True)
class Job:
    """A row of the table of jobs."""

    name: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    metadata: dict[str, str]
    message: str

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "STOPPED", "FAILED")

    def line(self) -> str:
        """One line of what a user wants to know first."""
        begun = datetime.fromtimestamp(self.started, UTC).strftime("%m-%d %H:%M:%S") if self.started else "-"
        seconds = f"{(self.ended or time.time()) - self.started:.0f} s" if self.started else "-"
        commit = self.metadata.get("commit", "unknown")
        short = commit[:12] + commit[40:]
        return (
            f"{self.name} {self.status:<9} {begun} {seconds:>8} {short} {self.metadata.get('workflow', '')}"
        )


@dataclass(frozen=True)
class RayJobs:
    """The jobs of one cluster."""

    cluster: str
    """What messages call it."""
    client: Any

    def submit(self, submission: Submission, line: str, runtime_env: dict[str, Any]) -> str:
        """Returns the job's name."""
        return self.client.submit_job(
            entrypoint=line,
            submission_id=submission.job,
            runtime_env=runtime_env,
            metadata=submission.metadata,
        )

    def every(self) -> list[Job]:
        """All jobs, oldest first."""
        found = [_job(one) for one in self.client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda one: one.started or 0)

    def get(self, name: str) -> Job:
        """Raises ClusterError where there is none of that name."""
        for one in (jobs := self.every()):
            if one.name == name:
                return one
        there = ", ".join(one.name for one in jobs) or "none"
        raise ClusterError(f"{self.cluster} has no job {name!r}; there are: {there}")

    def at_work_on(self, root: str) -> Job | None:
        """The job that is writing to a root, or will."""
        alive = (one for one in self.every() if not one.is_over)
        return next((one for one in alive if one.metadata.get("root") == root), None)

    def logs(self, name: str) -> str:
        """All that the job has said so far."""
        return self.client.get_job_logs(self.get(name).name)

    def follow(self, name: str) -> Job:
        """Prints what the job says until it is over.

        Raises:
            ClusterError: the connection broke; the job may go on.
        """
        self.get(name)
        try:
            asyncio.run(self._print(name))
            return self._over(name)
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"the connection to {self.cluster} broke: {error}; the job may go on: make logs JOB={name}"
            ) from error

    async def _print(self, name: str) -> None:
        async for text in self.client.tail_job_logs(name):
            print(text, end="", flush=True)

    def _over(self, name: str) -> Job:
        """The job once it is over: a log may end a moment before the table says so."""
        for _ in range(20):
            if (job := self.get(name)).is_over:
                return job
            time.sleep(0.5)
        raise RuntimeError("the log ended and the job did not")

    def cancel(self, name: str, stop_sec: float) -> Job:
        """Asks the job to end and waits for it.

        Raises:
            ClusterError: it has not ended after `stop_sec` and a little more.
        """
        job = self.get(name)
        if job.is_over:
            return job
        self.client.stop_job(name)
        start = time.monotonic()
        while not (job := self.get(name)).is_over:
            if time.monotonic() - start > stop_sec + 15:
                raise ClusterError(f"{name} was asked to end {stop_sec + 15:.0f} s ago and has not")
            time.sleep(0.5)
        return job


def _job(one: Any) -> Job:
    times = (None if moment is None else moment / 1000 for moment in (one.start_time, one.end_time))
    status = getattr(one.status, "value", one.status)
    return Job(one.submission_id, status, *times, one.metadata or {}, one.message or "")


def job_environment(environment: dict[str, str], stop_sec: int) -> dict[str, str]:
    """Variables of a job; what ends it waits as long for its checkpoint, where Ray's own patience is 3 s."""
    return {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(stop_sec)}


@contextmanager
def authentication(token: Path | None) -> Iterator[None]:
    """Ray's token for the block: what a user's environment says belongs to other clusters.

    Ray reads the mode once a process, when it is first imported.
    """
    variables = {"RAY_AUTH_MODE": "disabled" if token is None else "token"}
    variables |= {} if token is None else {"RAY_AUTH_TOKEN_PATH": str(token)}
    hidden = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", *OVERRIDING}
    before = {name: os.environ.pop(name, None) for name in hidden}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in hidden:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def ray_jobs(cluster: str, address: str, token: Path | None) -> Iterator[RayJobs]:
    """The jobs of the cluster whose Jobs API answers at an http address.

    Raises:
        ClusterError: nothing answers there, or what does asks for another token.
    """
    with authentication(token):
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
        try:
            client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise ClusterError(
                f"no Jobs API of {cluster} answers at {address}: {_first_line(error)}; "
                f"see make cluster-status CLUSTER={cluster}"
            ) from error
        except AuthenticationError as error:
            raise ClusterError(f"{cluster} refuses the token: {_first_line(error)}") from error
        yield RayJobs(cluster, client)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
