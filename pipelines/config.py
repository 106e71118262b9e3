"""YAML file and `key.path=value` overrides -> one validated, frozen configuration of a whole workflow."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.runtime.pool import ActorsConfig
from pipelines.runtime.session import RayConfig
from pipelines.shards.storage import Folder
from pipelines.sources.folder import FolderConfig
from pipelines.sources.parquet import ParquetConfig
from pipelines.sources.scenes import ScenesConfig
from pipelines.sources.tars import TarsConfig
from pipelines.sources.urls import UrlsConfig
from pipelines.stages.captions import CaptionsConfig
from pipelines.stages.curate import CurateConfig
from pipelines.stages.evaluate import EvaluateConfig
from pipelines.stages.image_features import LatentsConfig
from pipelines.stages.ingest import IngestConfig
from pipelines.stages.prompt_features import FeaturesConfig
from repfusion.train import TrainConfig
from repfusion.training.engine import grad_accum_steps

StageName = Literal[
    "source", "ingest", "judge", "curate", "captions", "latents", "features", "train", "evaluate", "report"
]


class ConfigError(ValueError):
    """A configuration that does not hold; the message names every bad key."""


class SourceConfig(BaseModel):
    """Where image addresses and captions come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["scenes", "urls", "tars", "folder", "parquet"] = "scenes"
    """The embedded world, rendered and served on loopback; a list of addresses; WebDataset tars; a folder of
    images; parquet files with images in them. The first two are downloaded, the others read.
    """
    scenes: ScenesConfig = ScenesConfig()
    """For kind: scenes."""
    urls: UrlsConfig | None = None
    """For kind: urls."""
    tars: TarsConfig | None = None
    """For kind: tars."""
    folder: FolderConfig | None = None
    """For kind: folder."""
    parquet: ParquetConfig | None = None
    """For kind: parquet."""
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage. Of tars, each is a shard.
    """
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the loopback server of kind: scenes; 0 takes any free one. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """Its pool. Changes no bytes."""

    @model_validator(mode="after")
    def _has_path(self) -> "SourceConfig":
        if getattr(self, self.kind) is None:
            raise ValueError(f"kind is {self.kind}, so source.{self.kind}.path has to say where they are")
        return self

    @property
    def makes_lists(self) -> bool:
        """Whether there is a stage `source` that lists what `ingest` downloads."""
        return self.kind in ("scenes", "urls")


class WorkflowConfig(BaseModel):
    """A workflow. Stage folders, checkpoints and outputs lie under `root`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    root: Path
    """Local folder of everything that the workflow writes, the data stages excepted where `data_url` is
    given.
    """
    data_url: str | None = None
    """Folder or fsspec URL (s3://...) of the data stages, source to features; None is `root`. Training reads
    a copy of remote columns under `root`.
    """
    storage_options: dict[str, Any] = {}
    """For the fsspec file system of `data_url`, such as an endpoint. Credentials belong into the environment.
    """
    last_stage: StageName = "report"
    """Where to stop; `features` prepares data without training."""
    source: SourceConfig = SourceConfig()
    """Image addresses and captions."""
    ingest: IngestConfig = IngestConfig()
    """Download and resize."""
    curate: CurateConfig = CurateConfig()
    """Which samples stay: stages judge and curate."""
    captions: CaptionsConfig = CaptionsConfig()
    """Alternative captions; `train.data.caption_weights` says how often each is drawn."""
    latents: LatentsConfig = LatentsConfig()
    """Encoder features, by `train.model.encoder`."""
    features: FeaturesConfig = FeaturesConfig()
    """Prompt features, by `train.model.mllm`."""
    train: TrainConfig
    """Training. Its `output_dir`, `data` folders and tracking address follow from `root` unless given."""
    num_train_workers: int | tuple[int, int] = 2
    """Data-parallel ranks of the training; [least, most] takes as many as the cluster has room for, and goes
    on with fewer after a node was lost. Each number in between has to divide the global batch.
    """
    train_max_failures: int = Field(default=3, ge=1)
    """How often the ranks start again from the last checkpoint, after one died, before the stage fails."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Scores of every checkpoint."""
    ray: RayConfig = RayConfig()
    """The cluster. Changes no bytes."""

    @property
    def data_folder(self) -> Folder:
        """Where the data stages' folders lie."""
        return Folder(Folder.at(self.data_url or self.root).url, self.storage_options)

    @model_validator(mode="after")
    def _ranks_divide(self) -> "WorkflowConfig":
        """A rank's share of the global batch is whole micro-batches."""
        least, most = self.train_workers_range
        if not 1 <= least <= most:
            raise ValueError(f"num_train_workers is {self.num_train_workers}, expected 1 <= least <= most")
        for world_size in range(least, most + 1):
            grad_accum_steps(self.train.global_batch_size, self.train.engine.micro_batch_size, world_size)
        return self

    @property
    def train_workers_range(self) -> tuple[int, int]:
        """Least and largest number of ranks."""
        workers = self.num_train_workers
        return (workers, workers) if isinstance(workers, int) else workers

    @model_validator(mode="before")
    @classmethod
    def _follow_root(cls, values: Any) -> Any:
        """Fills in what the layout of `root` decides."""
        if not isinstance(values, dict) or not isinstance(values.get("root"), str | Path):
            return values
        root = Path(values["root"])
        train = values.get("train") or {}
        if not isinstance(train, dict):
            return values
        columns = column_root(root, values.get("data_url"))
        data = {"images": columns / "curate", "features": columns / "latents"}
        conditioning = (train.get("model") or {}).get("conditioning")
        if conditioning == "text_embed" or conditioning == {"method": "text_embed"}:
            data["text"] = columns / "features"
        if (values.get("captions") or {}).get("columns"):
            data["captions"] = columns / "captions"
        # relative to the working directory, like `root`: MLflow resolves it where the run is started
        tracking = {"uri": f"sqlite:///{root.parent / 'mlflow.db'}", "run_name": root.name}
        followed = {
            **train,
            "output_dir": train.get("output_dir", root / "train"),
            "data": {**data, **(train.get("data") or {})},
            "tracking": {**tracking, **(train.get("tracking") or {})},
        }
        return {**values, "train": followed}


def column_root(root: Path, data_url: str | None) -> Path:
    """Where training finds the columns: beside each other on local disk, or copied there from a URL."""
    data = Folder.at(data_url or root)
    return data.path if data.is_local else root / "columns"


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that the configuration takes."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The known key that looks most like a mistaken one: same section first, then the same last word
    anywhere.
    """
    known = list(known_keys(WorkflowConfig))
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    last = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == last]
    if same:
        return max(same, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.5)), None)


def load_config(path: Path, overrides: Sequence[str] = ()) -> WorkflowConfig:
    """Defaults < YAML < overrides.

    Raises:
        ConfigError: a missing or unreadable file, a malformed override, an unknown key (with the nearest
        known one), a bad value.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such config file; shipped ones are in {Path(__file__).parent / 'configs'}"
        )
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return validate(values, str(path))


def validate(values: Any, place: str = "config") -> WorkflowConfig:
    """Raises ConfigError, one line for each bad key."""
    try:
        return WorkflowConfig.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"])) or "source"
            if problem["type"] == "extra_forbidden":
                near = nearest_key(key)
                lines.append(f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else ""))
            else:
                lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
        raise ConfigError("\n".join(f"{place}: {line}" for line in lines)) from error


def to_yaml(config: WorkflowConfig) -> str:
    """The resolved configuration; loading it again gives the same one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
