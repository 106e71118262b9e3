"""MLflow's tracking server in Kubernetes: PostgreSQL behind it, artifacts in S3, passwords, metrics."""

from typing import Any

from pydantic import Field

from repfusion.config import Config

PORT = 5000
Manifest = dict[str, Any]


class MlflowServer(Config):
    """A Deployment of the tracking server, and its Service, NAME-mlflow."""

    secret: str
    """Secret with MLFLOW_BACKEND_STORE_URI (postgresql://...), MLFLOW_AUTH_ADMIN_PASSWORD,
    MLFLOW_FLASK_SERVER_SECRET_KEY, the keys of the S3 store, and `basic_auth.ini`, whose database_uri names a
    database of its own.
    """
    artifacts: str
    """Where artifacts lie: s3://BUCKET/FOLDER."""
    num_cpus: int = Field(default=2, ge=1)
    memory_gib: float = Field(default=4, gt=0)
    workers: int = Field(default=4, ge=1)
    """Processes that answer."""


def mlflow_deployment(
    name: str, labels: dict[str, str], server: MlflowServer, container: Manifest
) -> Manifest:
    """The server's Deployment; `container` and its pod's settings are as for every pod of the cluster."""
    pod = {
        "containers": [_serving(container, f"{name}-mlflow", server)],
        "volumes": [{"name": "auth", "secret": {"secretName": server.secret, "items": [_INI]}}],
    }
    return {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }


_INI = {"key": "basic_auth.ini", "path": "basic_auth.ini"}


def _serving(container: Manifest, host: str, server: MlflowServer) -> Manifest:
    """Secrets come through the environment and a mounted file: the command line shows none."""
    values = {
        "MLFLOW_ARTIFACTS_DESTINATION": server.artifacts,
        "MLFLOW_AUTH_CONFIG_PATH": "/auth/basic_auth.ini",
        "MLFLOW_EXPOSE_PROMETHEUS": "/tmp/metrics",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{host},{host}:{PORT},localhost:*",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    health = {"httpGet": {"path": "/health", "port": PORT}}
    command = [".venv/bin/mlflow", "server", "--app-name", "basic-auth", "--host", "0.0.0.0"]
    return {
        **container,
        "command": [*command, "--port", str(PORT), "--workers", str(server.workers)],
        "env": [{"name": key, "value": value} for key, value in values.items()],
        "envFrom": [{"secretRef": {"name": server.secret}}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "volumeMounts": [{"name": "auth", "mountPath": "/auth", "readOnly": True}],
        "readinessProbe": {**health, "periodSeconds": 10},
        "livenessProbe": {**health, "initialDelaySeconds": 60, "periodSeconds": 30, "failureThreshold": 5},
    }


def mlflow_service(labels: dict[str, str]) -> Manifest:
    """A name inside the cluster alone."""
    ports = [{"name": "http", "port": PORT, "targetPort": PORT}]
    return {"type": "ClusterIP", "selector": labels, "ports": ports}
