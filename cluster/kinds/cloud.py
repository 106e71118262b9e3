"""Kinds `aws` and `gcp`: machines that Ray's own cluster launcher rents, by `ray up` and `ray down`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from cluster.config import BaseCluster, ClusterError, NodeConfig, option_words
from cluster.jobs import RayJobs, ray_jobs
from cluster.kinds.forwarding import forwarded
from cluster.kinds.submitting import JobsLauncher
from cluster.record import folder_of, token_file
from cluster.submission import Submission, image_guard
from repfusion.files import write_text

TOKEN = "~/.ray/auth_token"
"""Where Ray looks for its token by itself."""


class CloudGroup(NodeConfig):
    """Machines of one sort."""

    instance: str
    """Machine type as the provider names it."""
    min_workers: int = Field(default=0, ge=0)
    max_workers: int = Field(default=1, ge=0)
    spot: bool = False
    """Whether the provider may take them back."""
    disk_gib: int = Field(default=200, ge=20)


class CloudCluster(BaseCluster):
    """Machines of a provider, rented while there is work."""

    kind: Literal["aws", "gcp"]
    region: str
    zone: str
    project: str | None = None
    """Project of `gcp`."""
    image: str
    """Machine image: an AMI, or a source image of `gcp`, with the project in `folder`."""
    user: str = "ubuntu"
    folder: str = "/app"
    """The project's folder in the image, with its `.venv`."""
    head: CloudGroup
    workers: dict[str, CloudGroup] = {}
    """Groups of workers by name."""
    idle_minutes: int = Field(default=10, ge=1)
    """How long a machine without work is kept."""
    token: bool = True
    """Whether Ray asks for a token."""

    @model_validator(mode="after")
    def _gcp_says_where(self) -> "CloudCluster":
        if self.kind == "gcp" and not self.project:
            raise ValueError("kind gcp needs `project`")
        return self


class Cloud(JobsLauncher):
    """A cluster of Ray's launcher."""

    def __init__(self, name: str, config: CloudCluster):
        super().__init__(name, config)
        self.config = config

    @property
    def file(self) -> Path:
        return folder_of(self.name) / "launcher.yaml"

    @property
    def token(self) -> Path | None:
        return token_file(self.name) if self.config.token else None

    def render(self) -> dict[str, str]:
        values = launcher_values(self.name, self.config, self.token)
        return {"launcher.yaml": yaml.safe_dump(values, sort_keys=False)}

    def up(self) -> None:
        write_text(self.file, self.render()["launcher.yaml"])
        self._ray("up", "--yes", "--no-config-cache")

    def status(self) -> bool:
        self._ray("exec", command="ray status")
        return True

    @contextmanager
    def connected(self) -> Iterator[RayJobs]:
        with forwarded(self.name, lambda port: self._words("dashboard", "--port", str(port))) as address:
            with ray_jobs(self.name, address, self.token) as jobs:
                yield jobs

    def command(self) -> tuple[str, str, dict[str, str]]:
        return self.config.folder, ".venv/bin/python", {}

    def guard(self, submission: Submission) -> str:
        return image_guard(submission.commit)

    def down(self) -> None:
        if not self.file.is_file():
            print(f"{self.name} is not up (no {self.file}): nothing to end")
            return
        self._ray("down", "--yes")
        self.file.unlink()
        print(f"{self.name} is down; the provider's console is what tells whether a machine is left")

    def _words(self, command: str, *options: str) -> list[str]:
        if not self.file.is_file():
            raise ClusterError(f"{self.name} is not up: make cluster-up CLUSTER={self.name}")
        ray = str(Path(sys.executable).parent / "ray")
        return [ray, command, *options, str(self.file)]

    def _ray(self, verb: str, *options: str, command: str | None = None) -> None:
        words = [*self._words(verb, *options), *([command] if command else [])]
        if code := subprocess.run(words, check=False).returncode:
            raise ClusterError(f"`ray {verb}` ended with {code}; what it said stands above")


def launcher_values(name: str, config: CloudCluster, token: Path | None) -> dict[str, Any]:
    """The YAML file of Ray's cluster launcher."""
    groups = {"head": config.head, **config.workers}
    mode = "disabled" if token is None else "token"
    ray = f"cd {config.folder} && RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE={mode} .venv/bin/ray"
    serve = "--port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
    values = {
        "cluster_name": name,
        "max_workers": sum(one.max_workers for one in config.workers.values()),
        "idle_timeout_minutes": config.idle_minutes,
        "provider": _provider(config),
        "auth": {"ssh_user": config.user},
        "available_node_types": {key: _node_type(config, key, one) for key, one in groups.items()},
        "head_node_type": "head",
        "head_start_ray_commands": [f"{ray} stop", f"{ray} start --head {serve} {_options(config.head)}"],
        # the options of each group are its `resources` and `labels`: one command starts all of them
        "worker_start_ray_commands": [f"{ray} stop", f"{ray} start --address=$RAY_HEAD_IP:6379"],
    }
    return values | ({} if token is None else {"file_mounts": {TOKEN: str(token)}})


def _options(node: NodeConfig) -> str:
    return " ".join(
        option_words({key: value for key, value in node.start_options().items() if key != "labels"})
    )


def _provider(config: CloudCluster) -> dict[str, Any]:
    match config.kind:
        case "aws":
            place = {"region": config.region, "availability_zone": config.zone}
        case "gcp":
            place = {"region": config.region, "availability_zone": config.zone, "project_id": config.project}
    return {"type": config.kind, **place, "cache_stopped_nodes": False}


def _node_type(config: CloudCluster, name: str, group: CloudGroup) -> dict[str, Any]:
    number = {} if name == "head" else {"min_workers": group.min_workers, "max_workers": group.max_workers}
    resources = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
    given = {key: value for key, value in resources.items() if value is not None}
    machine = _aws_machine(config, group) if config.kind == "aws" else _gcp_machine(config, group)
    return {**number, "resources": given, "labels": group.labels, "node_config": machine}


def _aws_machine(config: CloudCluster, group: CloudGroup) -> dict[str, Any]:
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": group.disk_gib, "VolumeType": "gp3"}}
    market = {"InstanceMarketOptions": {"MarketType": "spot"}} if group.spot else {}
    # version 2 of the metadata service alone: its tokens keep the role's keys from what a job fetches
    metadata = {"HttpTokens": "required"}
    return {
        "InstanceType": group.instance,
        "ImageId": config.image,
        "BlockDeviceMappings": [disk],
        "MetadataOptions": metadata,
        **market,
    }


def _gcp_machine(config: CloudCluster, group: CloudGroup) -> dict[str, Any]:
    start = {"diskSizeGb": group.disk_gib, "sourceImage": config.image}
    spot = {"scheduling": [{"preemptible": True}]} if group.spot else {}
    gpus = {"scheduling": [{"onHostMaintenance": "TERMINATE"}]} if group.num_gpus and not group.spot else {}
    return {
        "machineType": group.instance,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": start}],
        **spot,
        **gpus,
    }
