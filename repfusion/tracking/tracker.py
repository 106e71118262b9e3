"""One MLflow run: what it was made with, what it read, how it went, what it left."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from repfusion.display.redaction import redact, redact_text
from repfusion.lineage import environment
from repfusion.tracking import store
from repfusion.tracking.checkpoints import Checkpoints
from repfusion.tracking.config import TrackingConfig, flatten, shown_parameters
from repfusion.tracking.outbox import Outbox, log
from repfusion.tracking.store import Point, StoreError

T = TypeVar("T")
NOTE = "mlflow.note.content"
"""Tag in which MLflow keeps a run's description."""


class Tracker:
    """One MLflow run. Where `config.uri` is None, every method does nothing and `run_id` is None.

    What a training logs is sent from a background thread, at once or when the store is back: such calls take
    under a millisecond and never raise. Its start, its configuration and its data sets are written before the
    method returns, and raise StoreError where that fails.

    With `attach`, logs into `config.run_id` without touching its status, as an evaluation or a node's monitor
    beside the training that owns the run does: a call returns once its data are in the store, and raises
    StoreError where they are not within `config.flush_sec`.
    """

    def __init__(self, config: TrackingConfig, attach: bool = False):
        self.uri, self.run_id = config.uri, config.run_id
        self.client: Any = None
        self.owns_run = self.is_buffered = not attach
        self.outbox: Outbox | None = None
        self.monitor: Any = None
        self.config = config
        if config.uri is None:
            return
        if attach:
            assert config.run_id is not None
            self.client = store.client_of(config.uri)
        else:
            experiment_id = store.prepare_store(config.uri, config.experiment, config.artifacts)
            self.client, self.run_id = store.start_run(
                config.uri, experiment_id, config.run_name, config.run_id, config.sweep
            )
        self.config = config.model_copy(update={"run_id": self.run_id})
        self.checkpoints = Checkpoints(
            self.client, str(self.run_id), config.registered_model or config.experiment
        )

    # What a run was made with and read

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The resolved configuration as the artifact `config.yaml`, and the few fields by which runs are
        compared as parameters, which on a resumed run stay as they were set first. Secrets are left out.
        """
        params = shown_parameters(redact(dict(config)))
        self._now(lambda: store.send_params(self.client, self.run_id, params))
        text = yaml.safe_dump(redact(dict(config)), sort_keys=False)
        self._now(lambda: self.client.log_text(self.run_id, text, "config.yaml"))

    def log_params(self, config: Mapping[str, Any]) -> None:
        params = flatten(redact(dict(config)))
        self._now(lambda: store.send_params(self.client, self.run_id, params))

    def log_environment(self, **facts: Any) -> None:
        """Commit, digest of the lock file, versions, this machine's name, and `facts`, as tags."""
        if self.client is None:
            return
        found = {
            "mlflow.source.git.commit": environment.git_commit(),
            "git.local_changes": environment.has_local_changes(),
            "lock.digest": environment.lock_digest(),
            "hostname": environment.node_name(),
            **{f"version.{name}": version for name, version in environment.versions().items()},
            **facts,
        }
        tags = {name: str(value) for name, value in found.items() if value is not None}
        self._now(lambda: store.send_tags(self.client, self.run_id, tags))

    def log_dataset(self, name: str, columns: Mapping[str, Path], num_samples: int) -> None:
        """A data set as the run's input: `mlflow.data.get_source` gives its columns' folders, manifest
        digests and stage fingerprints.
        """
        self._now(lambda: store.send_dataset(self.client, self.run_id, name, columns, num_samples))

    # How it goes

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        point = Point({key: float(value) for key, value in metrics.items()}, step, now_ms())
        if self.client is None:
            return
        if self.is_buffered:
            self._outbox().put(point)
        else:
            self._now(lambda: store.send_points(self.client, self.run_id, [point]))

    def log_image(self, path: Path, key: str, step: int) -> None:
        """An image file in the run's gallery: MLflow shows those of a `key` with a slider over the steps."""
        time_ms = now_ms()
        self._later(
            f"image {key}", lambda: store.send_image(self.client, self.run_id, path, key, step, time_ms)
        )

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, as it is when it is sent."""
        self._later(f"file {path.name}", lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def log_text(self, text: str, artifact_file: str) -> None:
        self._later(f"file {artifact_file}", lambda: self.client.log_text(self.run_id, text, artifact_file))

    def set_tag(self, key: str, value: str) -> None:
        self._later(f"tag {key}", lambda: self.client.set_tag(self.run_id, key, value))

    def start_system_metrics(self, node: str | None = None) -> None:
        """Watches this machine until `finish`. Once on each node, whichever of its processes calls it.

        Args:
            node: name in the metrics `system/NODE/...`; None: the machine's.
        """
        interval_sec = self.config.system_metrics_sec
        if self.client is None or interval_sec is None or self.monitor is not None:
            return
        from repfusion.tracking.system import NodeMonitor

        outbox = self._outbox()
        self.monitor = NodeMonitor(
            lambda values, step: outbox.put(Point(values, step, now_ms())),
            str(self.uri),
            str(self.run_id),
            node or environment.node_name(),
            interval_sec,
        )
        self.monitor.start()

    def describe(self, text: str) -> None:
        """Markdown that MLflow shows at the head of the run."""
        self.set_tag(NOTE, text)

    # What it leaves

    def log_checkpoint(self, folder: Path, step: int, wait_sec: float = 0.0) -> str | None:
        """A LoggedModel for a checkpoint, and a version of the registered model, its `latest`. The
        folder is named, not copied, and nothing is written into it.

        Returns:
            The LoggedModel's id; None where it is not made within `wait_sec`: it will be.
        """
        made: list[str] = []
        self._later(f"checkpoint of step {step}", lambda: made.append(self.checkpoints.log(folder, step)))
        if wait_sec and self.outbox is not None:
            self.outbox.flush(wait_sec)
        return made[0] if made else None

    def log_scores(
        self, checkpoint_step: int, metrics: Mapping[str, float], best_by: str | None = None
    ) -> None:
        """Metrics of a checkpoint: on the run at its step, and on its LoggedModel. The version whose
        `best_by` is the highest, of all the registered model's, becomes `best`.
        """
        if best_by is not None and best_by not in metrics:
            raise ValueError(f"best_by is {best_by!r}, the metrics are {sorted(metrics)}")
        values, time_ms = {key: float(value) for key, value in metrics.items()}, now_ms()
        self._later(
            f"scores of step {checkpoint_step}",
            lambda: self.checkpoints.score(checkpoint_step, values, best_by, time_ms),
        )

    def forget_checkpoint(self, step: int) -> None:
        """A checkpoint's folder was removed: its LoggedModel stays, with the tag `files` = `removed`."""
        self._later(f"removal of step {step}", lambda: self.checkpoints.forget(step))

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> "Tracker":
        """A run nested in this one, as of a sweep or an evaluation; `child.config` lets another process log
        into it. It logs as this one does, buffered or not, and has a `finish` of its own.
        """
        child = Tracker(self.config.model_copy(update={"uri": None, "run_id": None}))
        if self.client is None:
            return child
        run_id = self._now(lambda: store.start_child(self.client, str(self.run_id), name, tags or {}))
        config = self.config.model_copy(update={"run_id": run_id, "run_name": name})
        child = Tracker(config, attach=True)
        child.owns_run, child.is_buffered = True, self.is_buffered
        return child

    # The end

    def flush(self, limit_sec: float) -> bool:
        """Waits until all that was logged is in the store; False where `limit_sec` was too short."""
        return self.outbox is None or self.outbox.flush(limit_sec)

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what waits, for at most `config.flush_sec` and one request, then sets the run's status.

        Args:
            status: FINISHED, FAILED or KILLED. An attached tracker leaves the run's as it is.
        """
        if self.client is None:
            return
        deadline = time.monotonic() + self.config.flush_sec
        num_lost = 0
        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None
        if self.outbox is not None:
            num_lost = self.outbox.close(self.config.flush_sec)
            self.outbox = None
        if not self.owns_run:
            return
        try:
            left_sec = max(deadline - time.monotonic(), 0.0)
            store.patiently(lambda: store.end_run(self.client, str(self.run_id), status, num_lost), left_sec)
        except StoreError as error:
            log.warning("run %s stays open in %s: %s", self.run_id, redact_text(str(self.uri)), error)

    def _outbox(self) -> Outbox:
        if self.outbox is None:
            self.outbox = Outbox(
                lambda points: store.send_points(self.client, str(self.run_id), points),
                self.config.max_buffered_metrics,
                redact_text(str(self.uri)),
            )
        return self.outbox

    def _now(self, action: Callable[[], T]) -> T | None:
        if self.client is None:
            return None
        return store.patiently(action, self.config.flush_sec)

    def _later(self, what: str, action: Callable[[], object]) -> None:
        if self.client is not None and self.is_buffered:
            self._outbox().put_task(what, action)
        else:
            self._now(action)


def now_ms() -> int:
    return int(time.time() * 1000)
