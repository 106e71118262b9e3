"""Kind `kuberay`: manifests that kubectl applies, and jobs through a forwarded port of the head's service."""

import base64
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster.config import ClusterError
from cluster.jobs import RayJobs, ray_jobs
from cluster.kinds.forwarding import forwarded
from cluster.kinds.kube.manifests import (
    FOLDER,
    PYTHON,
    KubeRayCluster,
    Manifest,
    evaluation_job,
    ray_cluster,
    ray_job,
    tracking_server,
)
from cluster.kinds.submitting import JobsLauncher
from cluster.record import folder_of
from cluster.submission import Submission, image_guard, prepare
from repfusion.files import write_text

DEMO = Path("pipelines/configs/demo.yaml")
KINDS = {
    "RayCluster": "rayclusters.ray.io",
    "CronJob": "cronjobs.batch",
    "Deployment": "deployments.apps",
    "Service": "services",
}
"""Kinds of what `up` applies, as kubectl calls them."""


class KubeRay(JobsLauncher):
    """A RayCluster in Kubernetes, by kubectl and the user's own context."""

    def __init__(self, name: str, config: KubeRayCluster):
        super().__init__(name, config)
        self.config = config

    def render(self) -> dict[str, str]:
        return {
            f"{name}.yaml": yaml.safe_dump(one, sort_keys=False) for name, one in self.manifests().items()
        }

    def manifests(self) -> dict[str, Manifest]:
        """What is applied by `up` (cluster, evaluation), and a RayJob to apply by hand."""
        demo = prepare(self.config, DEMO, ())
        found = {
            "cluster": ray_cluster(self.name, self.config),
            "job": ray_job(f"{self.name}-demo", self.config, demo.words(PYTHON), demo.metadata),
        }
        if (wanted := self.config.evaluation) is not None:
            scored = prepare(self.config, wanted.workflow, ())
            words = [PYTHON, "-m", "pipelines", "evaluate", str(scored.workflow), "--step", wanted.step]
            found["evaluation"] = evaluation_job(
                self.name, self.config, wanted.schedule, [*words, *scored.overrides]
            )
        if (server := self.config.mlflow) is not None:
            found["mlflow"], found["mlflow-service"] = tracking_server(self.name, self.config, server)
        return found

    def up(self) -> None:
        folder = folder_of(self.name)
        for name, text in self.render().items():
            write_text(folder / name, text)
        applied = [folder / f"{name}.yaml" for name in self.manifests() if name != "job"]
        for path in applied:
            print(self._kubectl("apply", "-f", str(path)), end="")

    def status(self) -> bool:
        shown = self._kubectl(
            "get", "rayclusters.ray.io,pods", "-l", f"ray.io/cluster={self.name}", "-o", "wide"
        )
        print(self._kubectl("get", "rayclusters.ray.io", self.name) + shown, end="")
        return True

    @contextmanager
    def connected(self) -> Iterator[RayJobs]:
        service = f"service/{self.name}-head-svc"
        with forwarded(
            self.name, lambda port: self._words("port-forward", service, f"{port}:8265")
        ) as address:
            with ray_jobs(self.name, address, self._token()) as jobs:
                yield jobs

    def _token(self) -> Path | None:
        """The token that KubeRay made, in a file that nobody else reads."""
        if not self.config.token:
            return None
        text = self._kubectl("get", "secret", self.name, "-o", "jsonpath={.data.auth_token}")
        path = folder_of(self.name) / "token"
        write_text(path, base64.b64decode(text).decode(), mode=0o600)
        return path.resolve()

    def command(self) -> tuple[str, str, dict[str, str]]:
        return FOLDER, PYTHON, {}

    def guard(self, submission: Submission) -> str:
        return image_guard(submission.commit)

    def down(self) -> None:
        applied = [one for name, one in self.manifests().items() if name != "job"]
        objects = [f"{KINDS[one['kind']]}/{one['metadata']['name']}" for one in applied]
        print(self._kubectl("delete", "--ignore-not-found", *objects), end="")
        left = self._kubectl("get", "pods", "-l", f"ray.io/cluster={self.name}", "-o", "name").split()
        print(f"{self.name} is down: {len(left)} pods still end" if left else f"{self.name} is down")
        (folder_of(self.name) / "token").unlink(missing_ok=True)

    def _words(self, *words: str) -> list[str]:
        return ["kubectl", f"--namespace={self.config.namespace}", *words]

    def _kubectl(self, *words: str) -> str:
        """Raises ClusterError where it fails, or is not there."""
        try:
            done = subprocess.run(self._words(*words), capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise ClusterError("kubectl is not on this machine: kind kuberay works through it") from error
        if done.returncode:
            raise ClusterError(f"kubectl {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout
