"""The configuration of a whole workflow."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.evaluation.config import EvaluateConfig
from pipelines.runtime.session import RayConfig
from pipelines.shards.storage import Folder
from pipelines.sources.build import SourceConfig
from pipelines.sources.scenes import ScenesConfig
from pipelines.stages.captions import CaptionsConfig
from pipelines.stages.curate import CurateConfig
from pipelines.stages.image_features import LatentsConfig
from pipelines.stages.ingest import IngestConfig
from pipelines.stages.prompt_features import FeaturesConfig
from repfusion.config import Config
from repfusion.train import TrainConfig
from repfusion.training.engine import grad_accum_steps

StageName = Literal[
    "source", "ingest", "judge", "curate", "captions", "latents", "features", "train", "evaluate", "report"
]


class WorkflowConfig(Config):
    """A workflow. Stage folders, checkpoints and outputs lie under `root`."""

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
    source: SourceConfig = ScenesConfig()
    """Where images and captions come from. Scenes unless another `kind` is given, whose name alone stands for
    its defaults.
    """
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

    @field_validator("source", mode="before")
    @classmethod
    def _has_a_kind(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": "scenes", **value} if isinstance(value, dict) else value

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
        made = {"image_features": columns / "latents", "prompt_features": columns / "features"}
        if (values.get("captions") or {}).get("columns"):
            made["captions"] = columns / "captions"
        given = train.get("data") or {}
        data = {"images": columns / "curate", **given, "columns": {**made, **(given.get("columns") or {})}}
        # relative to the working directory, like `root`: MLflow resolves it where the run is started
        tracking = {"uri": f"sqlite:///{root.parent / 'mlflow.db'}", "run_name": root.name}
        followed = {
            **train,
            "output_dir": train.get("output_dir", root / "train"),
            "data": data,
            "tracking": {**tracking, **(train.get("tracking") or {})},
        }
        return {**values, "train": followed}


def column_root(root: Path, data_url: str | None) -> Path:
    """Where training finds the columns: beside each other on local disk, or copied there from a URL."""
    data = Folder.at(data_url or root)
    return data.path if data.is_local else root / "columns"
