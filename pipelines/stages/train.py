"""A training of a workflow: its section, the stage that it becomes, and what decides its weights."""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pipelines.dag import Place, ShardStage, Stage, WholeStage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.ranks import launch, progress_bar
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.digests import Digests, flatten
from pipelines.shards.lease import Lease
from pipelines.shards.manifest import MANIFEST, Upstream
from pipelines.shards.storage import Folder
from pipelines.stages.codes.tokenizer import tokenizer_folder
from pipelines.stages.decoder import decoder_folder
from repfusion.config import naming, weights_of
from repfusion.data.columns import manifest_digest
from repfusion.data.config import CAPTIONS, DataConfig
from repfusion.model.check import check_model
from repfusion.runs.checkpoint import load_start
from repfusion.runs.completion import latest_whole
from repfusion.runs.folder import RunFolder, complete_checkpoints
from repfusion.tracking import prepare_store
from repfusion.train import TrainConfig
from repfusion.training.engine import grad_accum_steps

NOT_BYTES = (
    "output_dir",
    "output_url",
    "data",
    "tracking",
    "keep_resume",
    "keep_last",
    "keep_every_steps",
    "log_every_steps",
)
"""Fields of the training that do not change its weights."""
ROUNDING = (
    "zero_stage",
    "frozen",
    "offload_optimizer",
    "activation_checkpointing",
    "compile",
    "reads_prompts_apart",
    "micro_batch_size",
    "attention",
    "num_threads",
)
"""Fields of its `engine` by which its weights differ in rounding alone, as they do by the number of ranks:
a training goes on from its checkpoint on other hardware.
"""
REFERENCE = re.compile(r"stage:(?P<stage>[^/]+)(?:/(?P<step>step_\d+))?")


@dataclass(frozen=True)
class Reference:
    """Something of a stage of the same workflow, which may not exist yet: a training's last checkpoint,
    `stage:NAME`, a certain one, `stage:NAME/step_00000500`, a column, `stage:NAME`, the decoder,
    `stage:decoder`, or the tokenizer, `stage:tokenizer`.
    """

    stage: str
    step: str | None

    @classmethod
    def of(cls, path: Any) -> "Reference | None":
        """None for a folder."""
        found = REFERENCE.fullmatch(str(path))
        return None if found is None else cls(found["stage"], found["step"])


class TrainingConfig(TrainConfig):
    """A training of a workflow."""

    num_workers: int | tuple[int, int] = 2
    """Data-parallel ranks; [least, most] takes as many as the cluster has room for, and goes on with fewer
    after a node was lost. Each number in between has to divide the global batch. Changes rounding alone.
    """
    max_failures: int = Field(default=3, ge=1)
    """How often the ranks start again from the last checkpoint, after one died, before the stage fails.
    Changes no bytes.
    """

    def plain(self, places: Path) -> TrainConfig:
        """What the ranks are given; `places` holds the folders of the workflow's images and columns."""
        fields = {name: getattr(self, name) for name in TrainConfig.model_fields}

        def folder(path: Path) -> Path:
            return path if (reference := Reference.of(path)) is None else places / reference.stage

        columns = {kind: folder(path) for kind, path in self.data.columns.items()}
        update = {"images": folder(self.data.images), "columns": columns}
        fields["data"] = self.data.model_copy(update=update)
        root = self.output_dir.parent  # a training's folder is ROOT/NAME
        if self.own_decoder is not None:
            fields["model"] = self.model.model_copy(update={"decoder": decoder_folder(root)})
        if self.own_tokenizer is not None:
            fields["model"] = self.model.model_copy(update={"tokenizer": tokenizer_folder(root)})
        plain = TrainConfig(**fields)
        return plain.with_written(self.written)

    @property
    def columns_read(self) -> dict[str, str]:
        """Names of the workflow's columns that the training reads, by kind."""
        found = {kind: Reference.of(path) for kind, path in self.data.columns.items()}
        return {kind: one.stage for kind, one in found.items() if one is not None}

    @property
    def own_decoder(self) -> Reference | None:
        """The decoder of the workflow that the model names; None where it names a folder, or has none."""
        return Reference.of(getattr(self.model, "decoder", None))

    @property
    def own_tokenizer(self) -> Reference | None:
        """The tokenizer of the workflow that the model names; None where it names a folder, or has none."""
        return Reference.of(getattr(self.model, "tokenizer", None))

    @property
    def readable(self) -> set[str]:
        """Kinds of columns that the training can read."""
        return {CAPTIONS, *self.model.columns}

    @model_validator(mode="after")
    def _ranks_divide(self) -> "TrainingConfig":
        """A rank's share of the global batch is whole micro-batches."""
        workers = self.num_workers
        least, most = (workers, workers) if isinstance(workers, int) else workers
        if not 1 <= least <= most:
            raise ValueError(f"num_workers is {workers}, expected 1 <= least <= most")
        for world_size in range(least, most + 1):
            grad_accum_steps(self.global_batch_size, self.engine.micro_batch_size, world_size)
        return self


def run_train(
    config: TrainConfig,
    num_workers: int | tuple[int, int],
    max_failures: int,
    columns: Sequence[tuple[Folder, Path]],
    evaluate: EvaluateConfig | None,
    ray: RayConfig,
) -> dict[str, Any]:
    """Trains to the end, resuming from the last complete checkpoint; returns what train.json says. With
    `evaluate`, checkpoints are scored beside it.

    Raises:
        ValueError: the cluster is too small for the ranks, or another run is at work at `output_url`.
        StageError: the training failed; its checkpoints stay, and the next run resumes from the last.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    alone = nullcontext() if config.output_url is None else Lease(Folder(config.output_url))
    if config.tracking.uri is not None:
        # Before any worker: two processes that first use a new SQLite file at the same time fail.
        prepare_store(config.tracking.uri, config.tracking.experiment, config.tracking.artifacts)
    beside = nullcontext() if evaluate is None else EvaluationScheduler(evaluate, config)
    with alone, ray_session(ray), beside, progress_bar(config):
        launch(config, num_workers, columns, max_failures)
    return json.loads((RunFolder(config.output_dir).summary).read_text())


def fingerprint_fields(name: str, config: TrainConfig, digests: Digests) -> dict[str, Any]:
    """What decides the weights of the training of a name: the configuration, and the digests of the folders
    that it names. Raises ValueError, naming the config key, where one is missing.
    """
    prefix = f"trainings.{name}."
    values = config.model_dump(mode="json", include=TrainConfig.model_fields.keys() - set(NOT_BYTES))
    values["engine"] = {key: value for key, value in values["engine"].items() if key not in ROUNDING}
    fields = flatten(values, prefix)
    for key, folder in weights_of(config).items():
        is_made_here = Reference.of(folder) is not None
        fields[prefix + key] = str(folder) if is_made_here else digests.folder(folder, prefix + key)
    fields[f"{prefix}data.caption_weights"] = config.data.caption_weights
    if config.data.held_out_share:
        fields[f"{prefix}data.held_out_share"] = config.data.held_out_share
    for column, folder in config.data.folders.items():
        if Reference.of(folder) is None:
            fields[f"{prefix}data.{column}"] = manifest_digest(folder)
    return fields | _mixed_data(config.data, f"{prefix}data.")


def _mixed_data(data: DataConfig, prefix: str) -> dict[str, Any]:
    """How often the data sets mixed into the workflow's own are drawn, and the digests of their columns.
    Raises ValueError, naming the config key, where a column is not complete.
    """
    fields: dict[str, Any] = {}
    if data.mix and data.weight != 1:
        fields[f"{prefix}weight"] = data.weight
    for name, dataset in sorted(data.mix.items()):
        mix = f"{prefix}mix.{name}."
        fields[f"{mix}weight"] = dataset.weight
        fields[f"{mix}caption_weights"] = dataset.caption_weights
        if dataset.held_out_share:
            fields[f"{mix}held_out_share"] = dataset.held_out_share
        for column, folder in dataset.folders.items():
            digest = fields[f"{mix}{column}"] = manifest_digest(folder)
            if digest is None:
                raise ValueError(
                    f"{mix}{column}: {folder} holds no complete stage (no {MANIFEST}); expected "
                    "a local folder that a workflow wrote: run that workflow to its end, or correct the path"
                )
    return fields


def train_stage(
    name: str,
    config: TrainingConfig,
    upstream: tuple[Stage, ...],
    start: Path | None,
    evaluate: EvaluateConfig | None,
    ray: RayConfig,
    place: Place,
) -> WholeStage:
    """The stage of a training.

    Args:
        name: of the stage and its folder.
        config: its section.
        upstream: the stages that it reads.
        start: output folder of the training that it goes on from, where `init_from` names one.
        evaluate: how its checkpoints are scored beside it; None does not.
        ray: the cluster.
        place: of the workflow.
    """

    def execute(above: Upstream) -> dict[str, Any]:
        plain = config.plain(place.columns)
        if config.output_url is not None:
            # of another configuration there are other checkpoints
            url = f"{config.output_url.rstrip('/')}/{stage.fingerprint[:16]}"
            plain = plain.model_copy(update={"output_url": url})
        resolved = plain if start is None else started_from(plain, start)
        ranks = config.num_workers, config.max_failures
        return run_train(resolved, *ranks, remote_copies(upstream, place), evaluate, ray)

    def check() -> None:
        if config.own_tokenizer is not None:
            return  # how large the model is follows from it
        model = check_model(config.model, f"trainings.{name}.model", config.own_decoder is None)
        if config.init_from is not None and Reference.of(config.init_from) is None:
            with naming(f"trainings.{name}.init_from"):
                load_start(model, config.init_from, on_meta=True)

    fields = fingerprint_fields(name, config, place.digests)
    stage = WholeStage(name, fields, Folder(str(place.root / name)), upstream, execute, check=check)
    return stage


def remote_copies(upstream: Sequence[Stage], place: Place) -> list[tuple[Folder, Path]]:
    """Columns that are not on local disk, each with the place of the copy that training reads."""
    if place.data.is_local:
        return []
    columns = (stage for stage in upstream if isinstance(stage, ShardStage))
    return [(stage.folder, place.columns / stage.name) for stage in columns]


def started_from(config: TrainConfig, base: Path) -> TrainConfig:
    """The training with the checkpoint that `init_from` stands for, of the training in the folder `base`.

    Raises:
        ValueError: there is no such checkpoint, or none that is whole.
    """
    reference, root = Reference.of(config.init_from), RunFolder(base).checkpoints
    assert reference is not None
    found = {path.name: path for path in complete_checkpoints(root)}
    chosen = latest_whole(root) if reference.step is None else found.get(reference.step)
    if chosen is None:
        wanted = reference.step or "checkpoint"
        raise ValueError(
            f"init_from is {config.init_from}, but {root} holds no complete {wanted}; it holds "
            f"{', '.join(found) or 'none'}"
        )
    return config.model_copy(update={"init_from": chosen})
