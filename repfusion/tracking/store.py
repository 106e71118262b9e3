"""MLflow's store: its client, a schema made once, metrics in and out, and which errors may pass."""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from repfusion.display.redaction import redact_text
from repfusion.files import digest_of
from repfusion.images.decode import read_image

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
# Read at every request: a client that tries for minutes by itself would hold up the end of a run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
PARENT, SWEEP = "mlflow.parentRunId", "sweep"
"""Tags of a nested run, and of the run that holds a sweep's."""
MAX_BATCH_METRICS = 1000
"""MLflow's limit of one request."""
LASTING = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""Error codes of what fails again however often it is tried."""
QUIET = {
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    # These two say at every attempt, with a traceback, what we say once.
    "mlflow.store.db.utils": logging.CRITICAL,
    "urllib3.connectionpool": logging.ERROR,
}
T = TypeVar("T")


class StoreError(RuntimeError):
    """The store does not answer, or does not take what was sent."""


class Point(NamedTuple):
    """Metrics of one step, as logged at `time_ms` (Unix epoch)."""

    values: Mapping[str, float]
    step: int
    time_ms: int
    model_id: str | None = None


def with_driver(uri: str) -> str:
    """postgresql:// names psycopg 3 to SQLAlchemy; MLflow's server knows psycopg2, and so does this package's
    extra `postgres`. Of an SQLite file whose path is encoded, MLflow would first make a folder as it is
    spelled.
    """
    if uri.startswith("sqlite:///") and "%" in uri:
        return uri.replace("sqlite://", "sqlite+pysqlite://", 1)
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", uri)


def client_of(uri: str) -> Any:
    import mlflow
    import mlflow.utils.logging_utils

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    uri = with_driver(uri)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_lasting(error: Exception) -> bool:
    """Whether trying again is useless."""
    return getattr(error, "error_code", None) in LASTING or isinstance(error, FileNotFoundError | TypeError)


def patiently(action: Callable[[], T], limit_sec: float) -> T:
    """What `action` returns, tried again while the store is away.

    Raises:
        StoreError: it did not work within `limit_sec`, or cannot.
    """
    deadline, pause = time.monotonic() + limit_sec, 0.2
    while True:
        try:
            return action()
        # Databases, object stores and HTTP each raise their own, from libraries that may be absent.
        except Exception as error:
            if is_lasting(error) or time.monotonic() + pause > deadline:
                raise StoreError(redact_text(str(error))) from error
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def send_points(client: Any, run_id: str, points: Sequence[Point]) -> None:
    """Metrics of several steps in one request. Sending the same again changes nothing."""
    import mlflow.entities

    metrics = [
        mlflow.entities.Metric(key, value, one.time_ms, one.step, model_id=one.model_id)
        for one in points
        for key, value in one.values.items()
    ]
    for start in range(0, len(metrics), MAX_BATCH_METRICS):
        client.log_batch(run_id, metrics[start : start + MAX_BATCH_METRICS])


def send_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Parameters can be set once: those that the run has stay."""
    import mlflow.entities

    known = client.get_run(run_id).data.params
    new = [mlflow.entities.Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])


def send_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    import mlflow.entities

    client.log_batch(run_id, tags=[mlflow.entities.RunTag(key, value) for key, value in tags.items()])


def send_output(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Names a LoggedModel as the run's output at a step."""
    import mlflow.entities

    client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(model_id, step)])


def send_image(client: Any, run_id: str, path: Path, key: str, step: int, time_ms: int) -> None:
    client.log_image(run_id, read_image(path.read_bytes()), key=key, step=step, timestamp=time_ms)


def newest_experiment(uri: str) -> str | None:
    """Id of the experiment with the run that started last; None where there is no run.

    Raises:
        StoreError: the store does not answer.
    """

    def newest() -> str | None:
        client = client_of(uri)
        ids = [one.experiment_id for one in client.search_experiments()]
        runs = client.search_runs(ids, max_results=1, order_by=["attributes.start_time DESC"]) if ids else []
        return runs[0].info.experiment_id if runs else None

    return _or_explain(newest, uri)


def sqlite_uri(path: Path) -> str:
    """The tracking address of an SQLite file, whatever characters its path has."""
    return "sqlite:///" + re.sub("[?#%]", lambda found: quote(found[0]), str(path))


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite address. None for other addresses."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def store_identity(uri: str) -> str:
    """sha256 of the store that an address leads to: one for every spelling of an SQLite file's path, whoever
    logs in.
    """
    path = sqlite_path(uri)
    return digest_of(redact_text(uri) if path is None else str(path.resolve()))


def artifact_root(uri: str, artifacts: str | None) -> str | None:
    """Where a new experiment's artifacts go; None lets the server choose."""
    if artifacts is not None:
        return artifacts if "://" in artifacts else Path(artifacts).resolve().as_uri()
    path = sqlite_path(uri)
    if path is not None:
        # Beside the database: MLflow would put them in the working directory.
        return (path.parent / "mlartifacts").resolve().as_uri()
    if not uri.startswith(("http://", "https://")):
        raise ValueError(
            f"tracking.artifacts is not set, and {redact_text(uri)} is a database without a server that "
            "could choose: give a folder that all nodes see, or s3://bucket/prefix"
        )
    return None


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time makes a database's schema: two that start at once would both fail."""
    path = sqlite_path(uri)
    if path is not None:
        with open(path.with_name(f".{path.name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    elif uri.startswith("postgres"):
        import sqlalchemy

        engine = sqlalchemy.create_engine(with_driver(uri), poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:  # the lock goes with the connection
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(77220604)"))
            yield
    else:
        yield


def prepare_store(uri: str, experiment: str, artifacts: str | None = None) -> str:
    """Creates the store and the experiment where they do not exist; returns the experiment's id. Call
    once, before workers start.

    Raises:
        ValueError: the experiment is deleted, or keeps its artifacts elsewhere.
        StoreError: the store does not answer.
    """
    root, path = artifact_root(uri, artifacts), sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)

    def prepare() -> str:
        with _alone(uri):
            client = client_of(uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                return client.create_experiment(experiment, artifact_location=root)
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"experiment {experiment!r} at {redact_text(uri)} is deleted; restore it, or set "
                "tracking.experiment to another name"
            )
        if artifacts is not None and found.artifact_location != root:
            raise ValueError(
                f"experiment {experiment!r} keeps its artifacts at {found.artifact_location}, not at {root}: "
                "set tracking.artifacts to that, or tracking.experiment to another name"
            )
        return found.experiment_id

    return _or_explain(prepare, uri)


def start_run(
    uri: str, experiment_id: str, run_name: str | None, run_id: str | None, sweep: str | None = None
) -> tuple[Any, str]:
    """A client and the id of a new run, nested in that of its sweep, or of `run_id`, which runs again."""

    def start() -> tuple[Any, str]:
        client = client_of(uri)
        if run_id is None:
            tags = None if sweep is None else {PARENT: sweep_run(client, uri, experiment_id, sweep)}
            return client, client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        client.update_run(run_id, status="RUNNING")
        return client, run_id

    return _or_explain(start, uri)


def sweep_run(client: Any, uri: str, experiment_id: str, name: str) -> str:
    """Id of the run that holds a sweep's; made where there is none yet."""
    with _alone(uri):
        oldest = ["attributes.start_time ASC"]
        found = client.search_runs([experiment_id], f"tags.{SWEEP} = '{name}'", 1, 1, oldest)
        if found:
            return found[0].info.run_id
        run = client.create_run(experiment_id, run_name=name, tags={SWEEP: name})
    client.set_terminated(run.info.run_id)  # nothing runs in it
    return run.info.run_id


def start_child(client: Any, parent_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Id of a new run nested in another."""
    experiment_id = client.get_run(parent_id).info.experiment_id
    tags = {**tags, PARENT: parent_id}
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


def end_run(client: Any, run_id: str, status: str, num_lost: int) -> None:
    if num_lost:
        client.set_tag(run_id, "tracking.num_lost", str(num_lost))
    client.set_terminated(run_id, status)


def _or_explain(action: Callable[[], T], uri: str) -> T:
    try:
        return action()
    except ValueError:
        raise
    # As in `patiently`.
    except Exception as error:
        reason = (redact_text(str(error)).splitlines() or [repr(error)])[0]
        raise StoreError(
            f"tracking.uri {redact_text(uri)}: cannot start a run there ({reason}). Is the server up, "
            "and the address right? tracking.uri=null trains without tracking"
        ) from error


def send_dataset(client: Any, run_id: str, name: str, columns: Mapping[str, Path], num_samples: int) -> None:
    """A data set as the run's input."""
    import mlflow.entities

    from repfusion.tracking import source as sources

    sources.register()
    source = sources.WebDatasetSource.of_columns(columns)
    digest = source.digest()
    dataset = mlflow.entities.Dataset(
        name=name,
        # MLflow's column is 36 characters wide; the tag holds all of it
        digest=digest[:36],
        source_type=source._get_source_type(),
        source=source.to_json(),
        # as MLflow's page of a run shows a schema and a profile
        schema=json.dumps({"mlflow_colspec": [{"name": one, "type": "binary"} for one in sorted(columns)]}),
        profile=json.dumps({"num_rows": num_samples, "num_columns": len(columns)}),
    )
    tags = [mlflow.entities.InputTag("mlflow.data.context", "training")]
    client.log_inputs(run_id, [mlflow.entities.DatasetInput(dataset, tags)])
    # MLflow keeps one source for each name and digest: where this run read the data is in a tag of its own.
    send_tags(client, run_id, {f"dataset.{name}.digest": digest, f"dataset.{name}.columns": source.to_json()})


def metric_history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, by step; empty where it was never logged. Of a step that a
    resumed training took again, what came last.
    """
    history = client_of(uri).get_metric_history(run_id, name)
    return sorted({one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}.items())
