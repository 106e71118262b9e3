"""Where runs are tracked, and a configuration -> MLflow's parameters."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from repfusion.config import Config
from repfusion.display.redaction import has_raw_password

MAX_PARAM_CHARS = 6000


class TrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking URI: sqlite:///runs/mlflow.db, postgresql://user@host/database (extra
    `postgres`), or a server's http://host:5000; None tracks nothing. A password belongs in PGPASSWORD,
    MLFLOW_TRACKING_PASSWORD or `${oc.env:NAME}`: what is written beside the checkpoints is the address
    without it.
    """
    experiment: str = "repfusion"
    """MLflow experiment; made where it does not exist."""
    run_name: str | None = None
    """Name of the run; None lets MLflow choose."""
    sweep: str | None = Field(default=None, pattern=r"^[\w .-]+$")
    """Nest the run in one of this name, which the first of a sweep's runs makes."""
    run_id: str | None = None
    """Continue this run, as a resumed training or an evaluation task does."""
    artifacts: str | None = None
    """Where a new experiment keeps images and files: a folder or s3://bucket/prefix. None: beside the SQLite
    file, or what the server chooses; a database without a server needs it."""
    registered_model: str | None = None
    """Registered model whose versions are the checkpoints; None: named as the experiment."""
    system_metrics_sec: PositiveFloat | None = 10.0
    """Seconds between two looks at a node's processors, memory, disks and network; None takes none."""
    max_buffered_metrics: PositiveInt = 500_000
    """Metric values kept in memory while the store is away, about 100 bytes each; then the oldest go."""
    flush_sec: PositiveFloat = 60.0
    """How long the end of a run waits for what has not been sent, and a call that must not be lost for the
    store."""

    @field_validator("uri")
    @classmethod
    def _password_is_encoded(cls, uri: str | None) -> str | None:
        """A database's driver would take a part of the password for a host, and say so in its errors."""
        if uri is not None and has_raw_password(uri):
            raise ValueError(
                "its password holds a space, '@', '/', '?' or '#' as it is; write %20, %40, %2F, %3F, %23 "
                "(urllib.parse.quote(password, safe='')), or leave it to PGPASSWORD"
            )
        return uri


SHOWN_PARAMETERS = (
    "model.conditioning.method",
    "model.mllm",
    "model.encoder.path",
    "model.encoder.layer",
    "model.dit.hidden_size",
    "model.dit.depth",
    "data.images",
    "init_from",
    "num_steps",
    "global_batch_size",
    "engine.lr",
    "engine.schedule",
    "engine.zero_stage",
    "engine.precision",
    "condition_dropout",
    "ema_decay",
    "seed",
)
"""Fields of a training that are a run's parameters, to compare runs by; all of it is the artifact
`config.yaml`.
"""


def shown_parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The few fields of a configuration by which runs are compared, those that it has."""
    flat = flatten(config)
    return {name: flat[name] for name in SHOWN_PARAMETERS if name in flat}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config -> MLflow parameters `engine.lr` and so on."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:MAX_PARAM_CHARS]
    return flat
