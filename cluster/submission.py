"""A workflow and overrides -> what a cluster is asked to run, and the reasons not to ask."""

import os
import secrets
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import BaseCluster, ClusterError
from repfusion.config import load_config
from repfusion.display.redaction import redact_text

if TYPE_CHECKING:
    from pipelines.config import WorkflowConfig

COMMIT = "REPFUSION_COMMIT"
"""Environment variable of the image: the commit that it was built from."""
PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Submission:
    """A workflow as it is to run on a cluster."""

    workflow: Path
    """The workflow's file, relative to the working directory."""
    overrides: tuple[str, ...]
    """What the command line and the cluster's storage say."""
    config: "WorkflowConfig"
    """The workflow as the job will read it."""
    commit: str
    """Commit of the code, `+changes` where files differ from it, or `unknown`."""
    job: str
    """Name of the job, a new one for each submission."""

    def words(self, python: str) -> list[str]:
        """The command that brings the workflow up to date."""
        return [python, "-m", "pipelines", "run", str(self.workflow), *self.overrides]

    @property
    def metadata(self) -> dict[str, str]:
        """What the table of jobs says of it."""
        return {"workflow": str(self.workflow), "root": str(self.config.root), "commit": self.commit}

    def finished(self) -> int | None:
        """Number of stages where all are up to date; None where something is to do, or where the workflow's
        root cannot be seen from here: then the job itself ends at once.
        """
        from pipelines.build import build_stages
        from pipelines.workflow.inspection import states

        if not self.config.root.is_dir():
            return None
        found = states(build_stages(self.config))
        return len(found) if all(one.status == "fresh" for one in found.values()) else None


def prepare(cluster: BaseCluster, workflow: Path, overrides: Sequence[str]) -> Submission:
    """Reads the workflow as the job will.

    Raises:
        ConfigError: the workflow does not hold.
        ClusterError: an override holds a secret, which the table of jobs would show.
    """
    from pipelines.config import WorkflowConfig

    for one in overrides:
        if redact_text(one) != one:
            raise ClusterError(
                f"override {redact_text(one)}: the table of jobs would show its secret; write "
                "${oc.env:NAME} into the workflow and set NAME in the nodes' environment"
            )
    plain = load_config(WorkflowConfig, workflow, overrides)
    every = (*overrides, *_placed(cluster, plain))
    config = load_config(WorkflowConfig, workflow, every)
    name = "".join(letter if letter.isalnum() else "-" for letter in config.root.name.lower()).strip("-")
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Submission(workflow, every, config, commit(), f"{name or 'job'}-{moment}-{secrets.token_hex(2)}")


def _placed(cluster: BaseCluster, config: "WorkflowConfig") -> list[str]:
    """Overrides that put a workflow where the cluster's nodes see it."""
    name, found = config.root.name, []
    if cluster.storage.root is not None:
        found.append(f"root={cluster.storage.root.rstrip('/')}/{name}")
    if cluster.storage.data_url is not None:
        found.append(f"data_url={cluster.storage.data_url.rstrip('/')}/{name}")
    if cluster.storage.output_url is not None:
        place = f"{cluster.storage.output_url.rstrip('/')}/{name}"
        found += [f"trainings.{one}.output_url={place}/{one}" for one in config.trainings]
    if cluster.mlflow_uri is not None:
        found += [f"trainings.{one}.tracking.uri={cluster.mlflow_uri}" for one in config.trainings]
    return found


def commit() -> str:
    """Commit of the code that lies here; in an image, which has no history, what it was built from."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT, "unknown")


def _git(*words: str) -> str:
    command = ["git", "-C", str(PROJECT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def image_guard(commit: str) -> str:
    """Shell that ends a job with a reason where its image was built from another commit."""
    text = (
        f"error: the image has commit ${{{COMMIT}:-unknown}}, this job was submitted from {commit}: "
        "commit what changed and build the image (cluster/README.md)"
    )
    return f'[ "${COMMIT}" = {commit} ] || {{ echo "{text}"; exit 1; }}; '


def shell_line(folder: str, words: Sequence[str], variables: dict[str, str]) -> str:
    """A line of shell that becomes the command: signals reach it, not a shell around it."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *settings, *words])}"
