"""What the configurations of all kinds of clusters have in common: nodes, storage, jobs."""

import json
from typing import Annotated, Any

from pydantic import Field, field_validator

from repfusion.config import Config
from repfusion.display.redaction import redact

NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
"""Names of clusters and groups: they become names of folders, jobs and Kubernetes objects."""
WORKING_FOLDER = "/app"
"""Where the project lies in the image."""


class ClusterError(RuntimeError):
    """A cluster that is not there, not reachable or not as it was asked for."""


class NodeConfig(Config):
    """One machine, or one part of this machine, as Ray is to see it."""

    num_cpus: int | None = Field(default=None, ge=0)
    """Logical CPUs; None counts the machine's."""
    num_gpus: int | None = Field(default=None, ge=0)
    """Logical GPUs; None counts the machine's."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory that Ray may hand out; None lets Ray decide. In Kubernetes it is the container's limit."""
    object_store_mib: int | None = Field(default=None, ge=80)
    """Shared memory for objects; None lets Ray decide. Samples do not pass through it."""
    labels: dict[str, str] = {}
    """Labels of the node, by which a stage may ask for it."""
    resources: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Further resources by name."""

    def start_options(self, **labels: str) -> dict[str, str]:
        """Options of `ray start` by name, without dashes."""
        marks = {**self.labels, **labels}
        options: dict[str, Any] = {
            "num-cpus": self.num_cpus,
            "num-gpus": self.num_gpus,
            "memory": None if self.memory_gib is None else int(self.memory_gib * 2**30),
            "object-store-memory": None if self.object_store_mib is None else self.object_store_mib << 20,
            "labels": ",".join(f"{name}={value}" for name, value in marks.items()) or None,
            "resources": json.dumps(self.resources) if self.resources else None,
        }
        return {name: str(value) for name, value in options.items() if value is not None}


def option_words(options: dict[str, str]) -> list[str]:
    """Words of a command line from options by name."""
    return [f"--{name}={value}" for name, value in options.items()]


class StorageConfig(Config):
    """Where workflows lie that are submitted here; it takes the place of what the workflow's file says."""

    root: str | None = None
    """Folder that all nodes see; a workflow's root is the folder of its own name in it. None leaves the
    workflow's own.
    """
    data_url: str | None = None
    """Folder or URL of the data stages, likewise. None leaves the workflow's own."""
    output_url: str | None = None
    """URL where every checkpoint is put too: a training's is the folder WORKFLOW/TRAINING in it. None leaves
    the workflow's own.
    """


class BaseCluster(Config):
    """What clusters of all kinds say."""

    storage: StorageConfig = StorageConfig()
    """Where the workflows lie."""
    mlflow_uri: str | None = None
    """Tracking server of the trainings; None leaves what the workflow says. Its password belongs into the
    nodes' environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD).
    """
    environment: dict[str, str] = {}
    """Variables of every job. Secrets do not belong here: the table of jobs shows them."""
    stop_sec: int = Field(default=120, ge=1)
    """How long a job may take to end, and to write its checkpoint, after it is asked to."""

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        if secrets := sorted(name for name in value if redact(value)[name] != value[name]):
            raise ValueError(
                f"{', '.join(secrets)}: the table of jobs would show it; set it in the nodes' environment"
            )
        return value
