"""Runs in MLflow: parameters, metrics, images and the data set's digest. The only file that imports mlflow.

The store is one SQLite file. Its schema is created once, by `prepare_store`, before any worker opens it: two
processes that first use a new file at the same time fail.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
MAX_PARAM_CHARS = 6000


class TrackingConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = None
    """MLflow tracking URI, such as sqlite:///runs/mlflow.db or a server's; None tracks nothing."""
    experiment: str = "repfusion"
    """MLflow experiment; made where it does not exist."""
    run_name: str | None = None
    """Name of the run; None lets MLflow choose."""
    run_id: str | None = None
    """Continue this run, as a resumed training or an evaluation task does."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config -> MLflow parameters `engine.lr` and so on."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:MAX_PARAM_CHARS]
    return flat


def _client(uri: str) -> Any:
    import mlflow
    import mlflow.utils.logging_utils

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


def sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def prepare_store(uri: str, experiment: str) -> str:
    """Creates the store and the experiment where they do not exist; returns the experiment's id. Call
    once, before workers start.
    """
    path = sqlite_path(uri)
    artifacts = None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Artifacts beside the database: MLflow would put them in the working directory.
        artifacts = (path.parent / "mlartifacts").resolve().as_uri()
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    return (
        client.create_experiment(experiment, artifact_location=artifacts)
        if found is None
        else found.experiment_id
    )


class Tracker:
    """One MLflow run. Where `config.uri` is None, every method does nothing and `run_id` is None.

    With `attach`, logs into `config.run_id` without touching its status: an evaluation beside the
    training that owns the run.
    """

    def __init__(self, config: TrackingConfig, attach: bool = False):
        self.uri, self.run_id = config.uri, config.run_id
        self.client = None
        if config.uri is None:
            return
        if attach:
            assert config.run_id is not None
            self.client = _client(config.uri)
            return
        experiment_id = prepare_store(config.uri, config.experiment)
        self.client = _client(config.uri)
        if self.run_id is None:
            self.run_id = self.client.create_run(experiment_id, run_name=config.run_name).info.run_id
        else:
            self.client.update_run(self.run_id, status="RUNNING")

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Parameters can be set once: on a resumed run those that exist stay."""
        if self.client is None:
            return
        import mlflow.entities

        known = self.client.get_run(self.run_id).data.params
        params = [mlflow.entities.Param(k, v) for k, v in flatten(config).items() if k not in known]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self.client is None:
            return
        import mlflow.entities

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, [mlflow.entities.Metric(k, float(v), now, step) for k, v in metrics.items()]
        )

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if self.client is not None:
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_dataset(self, name: str, digest: str | None, folder: str, num_samples: int) -> None:
        """A column as the run's input, with the digest of its manifest. MLflow has no WebDataset source
        of its own.
        """
        if self.client is None:
            return
        import mlflow.entities

        dataset = mlflow.entities.Dataset(
            name=name,
            digest=(digest or "unversioned")[
                :36
            ],  # MLflow's column is 36 characters wide; the tag below holds all of it
            source_type="webdataset",
            source=json.dumps({"folder": folder, "manifest_digest": digest}),
            profile=json.dumps({"num_samples": num_samples}),
        )
        tags = [mlflow.entities.InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [mlflow.entities.DatasetInput(dataset, tags)])
        self.client.set_tag(self.run_id, f"dataset.{name}.digest", digest or "unversioned")

    def set_tag(self, key: str, value: str) -> None:
        if self.client is not None:
            self.client.set_tag(self.run_id, key, value)

    def finish(self, status: str = "FINISHED") -> None:
        """`status`: FINISHED, FAILED or KILLED."""
        if self.client is not None:
            self.client.set_terminated(self.run_id, status)


def metric_history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, by step; empty where it was never logged."""
    history = _client(uri).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)
