"""Typed configuration -> manifests for KubeRay 1.7 and plain Kubernetes, as values that YAML writes."""

import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config import BaseCluster, NodeConfig
from cluster.kinds.kube.mlflow import MlflowServer, mlflow_deployment, mlflow_service
from repfusion.config import Config

RAY_VERSION = "2.60.0"
FOLDER = "/app"
"""The project's folder in the image, the pods' working directory."""
PYTHON = ".venv/bin/python"
DATA = "/data"
"""Where a shared volume lies in every pod."""
Manifest = dict[str, Any]


class KubeGroup(NodeConfig):
    """Pods of one sort, which come and go with the work."""

    min_replicas: int = Field(default=0, ge=0)
    max_replicas: int = Field(default=1, ge=0)
    num_cpus: int | None = Field(default=4, ge=1)
    """CPUs of the container."""
    num_gpus: int | None = Field(default=0, ge=0)
    """GPUs of the container."""
    memory_gib: float | None = Field(default=16, gt=0)
    """Memory of the container."""
    node_selector: dict[str, str] = {}
    """Labels that the Kubernetes node must have."""

    @model_validator(mode="after")
    def _least_is_at_most_most(self) -> "KubeGroup":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, max_replicas {self.max_replicas}")
        return self


class KubeHead(KubeGroup):
    """The head's pod, which runs the jobs' drivers and no stage."""

    min_replicas: Literal[1] = 1
    max_replicas: int = Field(default=1, ge=1, le=1)


class ScheduledEvaluation(Config):
    """A CronJob that submits an evaluation."""

    schedule: str = "0 3 * * *"
    """When, as cron writes it, in UTC."""
    workflow: Path
    """Path of the workflow, the same here and in the image."""
    step: str = "latest"
    """Which checkpoint: a number, latest, best or all."""


class KubeRayCluster(BaseCluster):
    """A RayCluster of KubeRay."""

    kind: Literal["kuberay"]
    image: str
    """Image of all pods; its tag should be the commit."""
    namespace: str = "default"
    head: KubeHead = KubeHead()
    workers: dict[str, KubeGroup]
    """Groups of workers by name."""
    idle_minutes: int = Field(default=10, ge=1)
    """How long a pod without work is kept."""
    queue: str | None = None
    """Kueue's local queue; None leaves Kueue out."""
    claim: str | None = None
    """PersistentVolumeClaim that every pod mounts at /data; None mounts nothing."""
    secret: str | None = None
    """Secret whose keys become environment variables of every pod: S3 keys, MLflow's password."""
    mlflow: MlflowServer | None = None
    """None runs no tracking server."""
    evaluation: ScheduledEvaluation | None = None
    """None schedules nothing."""
    token: bool = True
    """Whether Ray asks for a token; KubeRay makes it, as a secret of the cluster's name."""


def ray_cluster(name: str, config: KubeRayCluster) -> Manifest:
    """A cluster that stays until it is deleted."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(name, config, queued=True),
        "spec": _cluster_spec(config),
    }


def ray_job(name: str, config: KubeRayCluster, words: list[str], metadata: dict[str, str]) -> Manifest:
    """A workflow with a cluster of its own, which goes when it is over."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(name, config, queued=True),
        "spec": {
            "entrypoint": shlex.join(words),
            "metadata": metadata,
            # a job again is a workflow that goes on: what is complete is not done twice
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": _cluster_spec(config),
        },
    }


def evaluation_job(name: str, config: KubeRayCluster, schedule: str, words: list[str]) -> Manifest:
    """A plain CronJob that submits to the cluster: RayCronJob is alpha, off by default, and has no guard
    against overlaps.
    """
    address = f"http://{name}-head-svc:8265"
    submit = [".venv/bin/ray", "job", "submit", f"--address={address}", "--", *words]
    container = {**_container("submit", config), "command": submit, "resources": _sizes(1, 0, 2)}
    if config.token:
        container["env"] = [*container["env"], *_token(name)]
    pod = {"restartPolicy": "Never", "containers": [container], **_pod(config)}
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(f"{name}-evaluate", config, queued=False),
        "spec": {
            "schedule": schedule,
            "timeZone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {"spec": {"backoffLimit": 0, "template": {"spec": pod}}},
        },
    }


def tracking_server(name: str, config: KubeRayCluster, server: MlflowServer) -> list[Manifest]:
    """A Deployment and the Service that `mlflow_uri` names: http://NAME-mlflow:5000."""
    metadata = _metadata(f"{name}-mlflow", config, queued=False)
    labels = {"app.kubernetes.io/name": "mlflow", "app.kubernetes.io/instance": name}
    container = {**_container("mlflow", config), "resources": _sizes(server.num_cpus, 0, server.memory_gib)}
    spec = mlflow_deployment(name, labels, server, container)
    # of the settings of the cluster's pods, those of security alone: the server mounts no data
    spec["template"]["spec"]["securityContext"] = _pod(config)["securityContext"]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": mlflow_service(labels)},
    ]


def _cluster_spec(config: KubeRayCluster) -> Manifest:
    return {
        "rayVersion": RAY_VERSION,
        **({"authOptions": {"mode": "token"}} if config.token else {}),
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": config.idle_minutes * 60,
        },
        "headGroupSpec": {
            # loopback of the pod and its service: reached through `kubectl port-forward`
            "rayStartParams": {**_start(config.head), "num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "serviceType": "ClusterIP",
            "labels": config.head.labels,
            "template": _template("ray-head", config, config.head),
        },
        "workerGroupSpecs": [_worker_group(name, config, group) for name, group in config.workers.items()],
    }


def _worker_group(name: str, config: KubeRayCluster, group: KubeGroup) -> Manifest:
    return {
        "groupName": name,
        "replicas": group.min_replicas,
        "minReplicas": group.min_replicas,
        "maxReplicas": group.max_replicas,
        "rayStartParams": _start(group),
        "labels": group.labels,
        "template": _template("ray-worker", config, group),
    }


def _start(group: KubeGroup) -> dict[str, str]:
    """KubeRay itself reads the memory off the container's limits and passes the labels on."""
    options = group.start_options()
    return {name: value for name, value in options.items() if name not in ("memory", "labels")}


def _template(container: str, config: KubeRayCluster, group: KubeGroup) -> Manifest:
    sizes = _sizes(group.num_cpus or 1, group.num_gpus or 0, group.memory_gib or 1)
    grace = {"terminationGracePeriodSeconds": config.stop_sec}
    spec = {"containers": [{**_container(container, config), "resources": sizes}], **_pod(config), **grace}
    if group.node_selector:
        spec["nodeSelector"] = group.node_selector
    if group.num_gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


def _container(name: str, config: KubeRayCluster) -> Manifest:
    container: Manifest = {
        "name": name,
        "image": config.image,
        "workingDir": FOLDER,
        "env": [{"name": key, "value": value} for key, value in _variables(config).items()],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if config.secret:
        container["envFrom"] = [{"secretRef": {"name": config.secret}}]
    if config.claim:
        container["volumeMounts"] = [{"name": "data", "mountPath": DATA}]
    return container


def _variables(config: KubeRayCluster) -> dict[str, str]:
    return {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": FOLDER, **config.environment}


def _token(name: str) -> list[Manifest]:
    """KubeRay gives its own pods the token; other pods read the same secret."""
    reference = {"secretKeyRef": {"name": name, "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]


def _pod(config: KubeRayCluster) -> Manifest:
    pod: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }
    if config.claim:
        pod["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": config.claim}}]
    return pod


def _sizes(num_cpus: int, num_gpus: int, memory_gib: float) -> Manifest:
    """Requests are the limits, so that Ray's view of a pod is what it has."""
    sizes = {"cpu": str(num_cpus), "memory": f"{int(memory_gib * 1024)}Mi"}
    sizes |= {"nvidia.com/gpu": str(num_gpus)} if num_gpus else {}
    return {"requests": {**sizes}, "limits": {**sizes}}


def _metadata(name: str, config: KubeRayCluster, queued: bool) -> Manifest:
    labels = {"app.kubernetes.io/part-of": "repfusion", "app.kubernetes.io/instance": name}
    if queued and config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    return {"name": name, "namespace": config.namespace, "labels": labels}
