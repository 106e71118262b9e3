"""Workflows as jobs of Ray's Jobs API, the same for every kind whose head answers it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from cluster.config import BaseCluster
from cluster.jobs import Job, RayJobs, job_environment
from cluster.submission import Submission, prepare, shell_line
from repfusion.locks import JOB


class JobsLauncher(ABC):
    """The half of a Launcher that is about jobs."""

    def __init__(self, name: str, config: BaseCluster):
        self.name, self.base = name, config

    @abstractmethod
    def connected(self) -> AbstractContextManager[RayJobs]:
        """The jobs of the cluster, for as long as the block lasts."""

    @abstractmethod
    def command(self) -> tuple[str, str, dict[str, str]]:
        """The folder a job runs in, its Python, and variables of its driver alone."""

    def guard(self, submission: Submission) -> str:
        """Shell that ends a job whose code is another than here; nothing where the code is the same files."""
        return ""

    def submit(self, workflow: Path, overrides: Sequence[str], follow: bool) -> bool:
        submission = prepare(self.base, workflow, overrides)
        if (stages := submission.finished()) is not None:
            print(f"nothing to do: all {stages} stages of {workflow} are fresh in {submission.config.root}")
            return True
        with self.connected() as jobs:
            job = self._handed_over(jobs, submission)
            return self._followed(jobs, job) if follow else True

    def _handed_over(self, jobs: RayJobs, submission: Submission) -> str:
        if at_work := jobs.at_work_on(submission.metadata["root"]):
            print(f"{submission.workflow} is at work already: job {at_work.name}, {at_work.status}")
            return at_work.name
        folder, python, variables = self.command()
        variables = {**variables, JOB: submission.job}
        line = self.guard(submission) + shell_line(folder, submission.words(python), variables)
        environment = job_environment(self.base.environment, self.base.stop_sec)
        job = jobs.submit(submission, line, {"env_vars": environment})
        print(f"submitted {job} to {self.name}, commit {submission.commit}")
        print(f"  make logs JOB={job} CLUSTER={self.name} FOLLOW=1")
        return job

    def _followed(self, jobs: RayJobs, name: str) -> bool:
        try:
            job = jobs.follow(name)
        except KeyboardInterrupt:
            print(
                f"\nno longer following; the job goes on (make cancel JOB={name} CLUSTER={self.name} ends it)"
            )
            return True
        print(f"{job.name}: {job.status}")
        return job.status == "SUCCEEDED"

    def jobs(self) -> None:
        with self.connected() as jobs:
            print_jobs(self.name, jobs.every())

    def logs(self, job: str, follow: bool) -> bool:
        with self.connected() as jobs:
            if follow:
                return self._followed(jobs, job)
            print(jobs.logs(job), end="")
            return True

    def cancel(self, job: str) -> None:
        with self.connected() as jobs:
            over = jobs.get(job).is_over
            found = jobs.cancel(job, self.base.stop_sec)
            print(f"{job}: {'was over already, ' if over else ''}{found.status}")

    def render(self) -> dict[str, str]:
        return {}


def print_jobs(name: str, jobs: Sequence[Job]) -> None:
    """A line a job, or that there is none."""
    for job in jobs:
        print(job.line())
    if not jobs:
        print(f"{name} has no jobs yet: make submit W=workflow.yaml CLUSTER={name}")


def in_place() -> str:
    """The working directory, where relative paths of a workflow mean what they mean to `make run`."""
    return os.getcwd()
