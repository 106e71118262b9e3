"""The configuration of a whole workflow."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.dag import local_columns
from pipelines.evaluation.config import EvaluateConfig
from pipelines.runtime.session import RayConfig
from pipelines.shards.storage import Folder
from pipelines.sources.build import SourceConfig
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.scenes import ScenesConfig
from pipelines.stages.captions import CaptionsConfig
from pipelines.stages.codes.column import CodesConfig
from pipelines.stages.codes.tokenizer import TOKENIZER, TokenizerStageConfig
from pipelines.stages.curate import CurateConfig
from pipelines.stages.decoder import DECODER, DecoderStageConfig
from pipelines.stages.image_features import ImageFeaturesConfig, VideoFeaturesConfig
from pipelines.stages.prompt_features import PromptFeaturesConfig
from pipelines.stages.rewrites import RewritesConfig
from pipelines.stages.train import Reference, TrainingConfig
from repfusion.config import Config, naming, tags_of
from repfusion.display.interpolations import Written, below
from repfusion.latents.geometry import is_vae
from repfusion.model.config import ModelConfig
from repfusion.runs.checkpoint import continued_fields
from repfusion.tracking import sqlite_uri
from repfusion.train import TrainConfig

BEFORE_COLUMNS = ("source", "ingest", "judge", "curate")
AFTER_TRAININGS = ("evaluate", "report")
RESERVED = {*BEFORE_COLUMNS, TOKENIZER, DECODER, *AFTER_TRAININGS, "columns"}
"""Names that no column or training may have: those of other stages, and of the copies of remote columns."""

ColumnConfig = Annotated[
    ImageFeaturesConfig
    | VideoFeaturesConfig
    | PromptFeaturesConfig
    | RewritesConfig
    | CodesConfig
    | CaptionsConfig,
    Field(discriminator="kind"),
]
KINDS = {kind for one in get_args(get_args(ColumnConfig)[0]) for kind in tags_of(one)}
DRAWN = ("scenes", "edits", "moving_scenes")
FOR_CLIPS = ("moving_scenes", "tars", "folder", "parquet")
"""Kinds of sources that may hold clips."""
"""Kinds of sources that are drawn from the embedded world, whose suites grade them."""
HELD_OUT_SHARE = 0.05
"""What share of data of one's own is left for evaluation."""
DEFAULT_COLUMNS = ("image_features", "prompt_features")
"""Kinds of columns that a workflow of images has one of, under that name, unless it says otherwise."""


class WorkflowConfig(Config):
    """A workflow. Stage folders, checkpoints and outputs lie under `root`."""

    root: Path
    """Local folder of everything that the workflow writes, the data stages excepted where `data_url` is
    given.
    """
    data_url: str | None = None
    """Folder or fsspec URL (s3://...) of the data stages, source to columns; None is `root`. Training reads
    a copy of remote columns under `root`.
    """
    storage_options: dict[str, Any] = {}
    """Options of the fsspec file system of `data_url`, such as an endpoint. Credentials belong into the
    environment.
    """
    last_stage: str = "report"
    """Where to stop: source, ingest, judge, curate, a column, a training, evaluate or report. The last column
    prepares data without training.
    """
    overlap: bool = False
    """Whether a shard goes on to the next stage while others are still made, so that encoding does not wait
    for the last download. A stage still waits for files of another as a whole: `curate` for the duplicates
    among all samples, unless `curate.duplicates` is `keep`. Changes no bytes.
    """
    source: SourceConfig = ScenesConfig()
    """Where images and captions come from. Scenes unless another `kind` is given, whose name alone stands for
    its defaults.
    """
    ingest: IngestConfig = IngestConfig()
    """Download and resize."""
    curate: CurateConfig = CurateConfig()
    """Which samples stay: stages judge and curate."""
    columns: dict[str, ColumnConfig]
    """What is made of the samples, one stage each, by the name of the stage and its folder. Without any,
    `image_features` and `prompt_features`, each made where a training's model can read it. A section needs no
    `kind` where its name is one.
    """
    decoder: DecoderStageConfig | None = None
    """The RAE decoder that is trained on the curated images, which trainings name by `model.decoder:
    stage:decoder`; None trains none.
    """
    tokenizer: TokenizerStageConfig | None = None
    """The tokenizer of images into codes that is trained on the curated images, which columns of codes and
    trainings name by `tokenizer: stage:tokenizer`; None trains none.
    """
    trainings: dict[str, TrainingConfig]
    """What is trained, one stage each, by the name of the stage and its folder. Without any, one: `train`.
    Output folder and tracking address follow from `root` unless given, and each reads the images and one
    column of each kind that its model can use: `data.columns.image_features: stage:NAME` chooses another, a
    folder one of elsewhere. `init_from: stage:NAME` goes on from the last checkpoint of the training NAME,
    `stage:NAME/step_00000500` from that one; model fields that are not given are then that training's.
    """
    evaluate: EvaluateConfig = EvaluateConfig()
    """Scores of every checkpoint of a training. Unless suites are given, scenes are asked for scenes, and
    data of one's own for captions that are held out of it (suite `prompts`); in that suite images,
    held_out_share and encoder are the training's unless given.
    """
    ray: RayConfig = RayConfig()
    """The cluster. Changes no bytes."""

    @property
    def data_folder(self) -> Folder:
        """Where the data stages' folders lie."""
        return Folder(Folder.at(self.data_url or self.root).url, self.storage_options)

    @property
    def scored(self) -> str:
        """Name of the training whose checkpoints are evaluated."""
        return self.evaluate.training or list(self.trainings)[-1]

    def with_written(self, written: Written) -> Self:
        """A workflow that knows, and whose trainings know, the texts of values from the environment."""
        trainings = {
            name: one.with_written(below(written, f"trainings.{name}"))
            for name, one in self.trainings.items()
        }
        return super().with_written(written).model_copy(update={"trainings": trainings})

    def training(self, name: str) -> TrainConfig:
        """A training as it runs, with the folders of its columns."""
        return self.trainings[name].plain(local_columns(self.data_folder, self.root))

    def readers(self, column: str) -> list[str]:
        """Names of the trainings that read a column of this workflow."""
        return [name for name, one in self.trainings.items() if column in one.columns_read.values()]

    @property
    def made_columns(self) -> list[str]:
        """Names of the columns that are made: those that a training reads, or that need none to say what
        makes them. Captions come first, as other columns are made from them.
        """
        made = [name for name, one in self.columns.items() if one.stands_alone or self.readers(name)]
        return sorted(made, key=lambda name: not isinstance(self.columns[name], CaptionsConfig))

    @property
    def stage_names(self) -> list[str]:
        """Every stage, in an order in which each follows what it reads."""
        decoder = [] if self.decoder is None else [DECODER]
        tokenizer = [] if self.tokenizer is None else [TOKENIZER]
        columns = [*tokenizer, *self.made_columns]
        return [*BEFORE_COLUMNS, *columns, *decoder, *_in_order(self.trainings), *AFTER_TRAININGS]

    @property
    def decoded(self) -> list[str]:
        """Names of the trainings whose decoder is the workflow's own."""
        return [name for name, one in self.trainings.items() if one.own_decoder is not None]

    @field_validator("source", mode="before")
    @classmethod
    def _has_a_kind(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": "scenes", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_fit(self) -> "WorkflowConfig":
        for name in [*self.columns, *self.trainings]:
            if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"{name!r} cannot name a column or training; expected letters, digits, '_' and '-', and "
                    f"none of {', '.join(sorted(RESERVED))}"
                )
        if both := self.columns.keys() & self.trainings.keys():
            raise ValueError(f"{', '.join(sorted(both))}: a column and a training have the same name")
        for name, training in self.trainings.items():
            if Path(os.path.abspath(training.output_dir)) != Path(os.path.abspath(self.root / name)):
                raise ValueError(
                    f"trainings.{name}.output_dir is {training.output_dir}; in a workflow it is ROOT/{name}, "
                    f"here {self.root / name}, so that no two roots write to one training: leave it out"
                )
        if not self.trainings:
            raise ValueError("trainings: there is none; leave the section out for one of the name 'train'")
        return self

    @model_validator(mode="after")
    def _clips_go_where_they_are_read(self) -> "WorkflowConfig":
        if self.ingest.clips is None:
            if self.source.kind == "moving_scenes":
                raise ValueError("source.kind moving_scenes draws clips: give ingest.clips, such as {}")
            if made := [name for name, one in self.columns.items() if isinstance(one, VideoFeaturesConfig)]:
                raise ValueError(f"columns.{made[0]} is of clips: give ingest.clips, or take image_features")
            return self
        if self.source.kind not in FOR_CLIPS:
            raise ValueError(
                f"ingest.clips with source.kind {self.source.kind}, which has images alone; clips come from "
                f"{', '.join(FOR_CLIPS)}"
            )
        made = self.made_columns
        if of_images := [name for name in made if isinstance(self.columns[name], ImageFeaturesConfig)]:
            raise ValueError(
                f"columns.{of_images[0]} is of images, ingest.clips makes clips: take video_features"
            )
        models = {name: one.model for name, one in self.trainings.items()}
        drawn = [name for name, one in models.items() if isinstance(one, ModelConfig) and one.draws_clips]
        ends = [*BEFORE_COLUMNS, *made, *drawn]
        if self.last_stage not in ends:
            raise ValueError(
                f"last_stage is {self.last_stage!r}, which is not of clips (a training on them gives "
                "model.encoder.num_frames; evaluations know nothing of clips yet): stop earlier, such as "
                f"last_stage={ends[-1]}"
            )
        return self

    @model_validator(mode="after")
    def _references_lead_somewhere(self) -> "WorkflowConfig":
        for name, training in self.trainings.items():
            start = Reference.of(training.init_from)
            if start is not None and start.stage not in self.trainings:
                raise ValueError(
                    f"trainings.{name}.init_from: {training.init_from} names no training of this workflow; "
                    f"there are {', '.join(self.trainings)}"
                )
            if training.own_decoder is not None and (
                training.own_decoder.stage != DECODER or self.decoder is None
            ):
                there = "there is no section 'decoder'" if self.decoder is None else "expected stage:decoder"
                raise ValueError(
                    f"trainings.{name}.model.decoder: {training.model.decoder} is no decoder of this "
                    f"workflow: {there}"
                )
            if start is not None:
                _check_handover(f"trainings.{name}.init_from", training, self.trainings[start.stage])
            for kind, column in training.columns_read.items():
                if column not in self.columns or self.columns[column].kind != kind:
                    there = [other for other, one in self.columns.items() if one.kind == kind]
                    raise ValueError(
                        f"trainings.{name}.data.columns.{kind}: stage:{column} is no such column of this "
                        f"workflow; expected a folder or stage:NAME, NAME one of {', '.join(there)}"
                    )
        self._check_tokenizers()
        if self.scored not in self.trainings:
            raise ValueError(
                f"evaluate.training is {self.scored!r}; expected one of {', '.join(self.trainings)}"
            )
        for name in self.columns.keys() - set(self.made_columns) - set(DEFAULT_COLUMNS):
            raise ValueError(
                f"columns.{name}: no training reads it, and it does not say what makes it; name its model or "
                f"give a training data.columns.{self.columns[name].kind}: stage:{name}"
            )
        if self.last_stage not in (names := self.stage_names):
            raise ValueError(
                f"last_stage is {self.last_stage!r}; expected one of this workflow's stages, "
                f"{', '.join(names)} (prompt features are one where a training's model reads them)"
            )
        return self

    def _check_tokenizers(self) -> None:
        """Raises ValueError where what names the workflow's tokenizer names none of it, or would have to wait
        for it.
        """
        named = {f"trainings.{name}.model": one.own_tokenizer for name, one in self.trainings.items()}
        for name, column in self.columns.items():
            if isinstance(column, CodesConfig):
                named[f"columns.{name}"] = Reference.of(column.tokenizer)
        for key, reference in named.items():
            if reference is None:
                continue
            if reference.stage != TOKENIZER or self.tokenizer is None:
                there = "there is no section 'tokenizer'" if self.tokenizer is None else "it is another stage"
                raise ValueError(
                    f"{key}.tokenizer: stage:{reference.stage} is no tokenizer of this workflow: {there}; "
                    f"expected a folder or stage:{TOKENIZER}"
                )
            if self.overlap:
                raise ValueError(
                    f"overlap: {key}.tokenizer is stage:{TOKENIZER}, for which all codes wait; leave overlap "
                    "out, or name the folder of a tokenizer that is there"
                )

    @model_validator(mode="before")
    @classmethod
    def _follow_root(cls, values: Any) -> Any:
        """Fills in default columns and trainings, and what the layout of `root` decides."""
        if not isinstance(values, dict):
            return values
        columns, trainings = values.get("columns", {}), values.get("trainings", {"train": {}})
        if not (isinstance(columns, dict) and isinstance(trainings, dict)):
            return values
        columns = _with_kinds(columns, DEFAULT_COLUMNS if _makes_images(values) else ())
        if isinstance(values.get("root"), str | Path):
            own = _kind_of_source(values.get("source")) not in DRAWN
            layout = _Layout(
                Path(values["root"]), _defaults(columns), trainings, HELD_OUT_SHARE if own else 0
            )
            trainings = {name: layout.fill(name) for name in trainings}
            if isinstance(evaluate := values.get("evaluate", {}), dict):
                values = {**values, "evaluate": _of_own_data(evaluate, own, layout, values.get("data_url"))}
        return {**values, "columns": columns, "trainings": trainings}


def _check_handover(key: str, training: TrainingConfig, start: TrainingConfig) -> None:
    """Raises ValueError where a training cannot go on from another's checkpoint."""
    own, before = training.model, start.model
    with naming(key):
        if type(own) is not type(before):
            raise ValueError(f"{own.label} takes nothing of {before.label}; name another, or none")
        if isinstance(own, ModelConfig) and isinstance(before, ModelConfig):
            own.conditioning.handover(before.conditioning)


def _kind_of_source(source: Any) -> Any:
    """The kind that a file gives its source, however it writes it."""
    if isinstance(source, dict):
        return source.get("kind", "scenes")
    return "scenes" if source is None else getattr(source, "kind", source)


def _of_own_data(evaluate: dict[str, Any], own: bool, layout: "_Layout", data_url: Any) -> dict[str, Any]:
    """The section `evaluate`, its suites of prompts with what the scored training says of its images."""
    suites = evaluate.get("suites", {"prompts": {}} if own else None)
    name = str(evaluate.get("training") or next(reversed(layout.given), ""))
    section = layout.filled.get(name)
    if not isinstance(suites, dict) or not isinstance(section, dict):
        return evaluate
    data, encoder = section.get("data", {}), layout.models.get(name, {}).get("encoder", {})
    places = local_columns(Folder.at(data_url or layout.root), layout.root)
    stage = Reference.of(data.get("images"))
    says = {
        "images": data.get("images") if stage is None else places / stage.stage,
        "held_out_share": data.get("held_out_share", 0.0),
        **({"encoder": encoder["path"], "layer": encoder["layer"]} if _is_tower(encoder) else {}),
    }
    filled = {
        name: {**says, **one} if isinstance(one, dict) and one.get("kind", name) == "prompts" else one
        for name, one in suites.items()
    }
    return {**evaluate, "suites": filled}


def _is_tower(encoder: Mapping[str, Any]) -> bool:
    """Whether a training's encoder is a vision tower that is there."""
    path = encoder.get("path")
    return path is not None and (Path(path) / "config.json").is_file() and not is_vae(path)


def _makes_images(values: Mapping[str, Any]) -> bool:
    """Whether a file's section `ingest` makes images, and no clips."""
    ingest = values.get("ingest")
    clips = ingest.get("clips") if isinstance(ingest, dict) else getattr(ingest, "clips", None)
    return clips is None


def _with_kinds(columns: Mapping[str, Any], default: Sequence[str]) -> dict[str, Any]:
    """The columns of a file, each with its kind where its name says it, and one of each default kind."""
    found: dict[str, Any] = {
        name: {"kind": name, **(one or {})} if name in KINDS and isinstance(one, dict | None) else one
        for name, one in columns.items()
    }
    kinds = {_kind(one) for one in found.values()}
    return {**{kind: {"kind": kind} for kind in default if kind not in kinds}, **found}


def _kind(column: Any) -> str | None:
    return column.get("kind") if isinstance(column, dict) else getattr(column, "kind", None)


@dataclass(frozen=True)
class _Layout:
    """What `root` decides of the trainings of a file."""

    root: Path
    columns: Mapping[str, str]
    """The column of each kind that a training reads unless it says otherwise."""
    given: Mapping[str, Any]
    """The trainings' sections as they were given."""
    held_out_share: float = 0.0
    """What share of the samples a training leaves out unless it says otherwise."""
    filled: dict[str, Any] = field(default_factory=dict)
    """The sections that were filled in so far."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """All fields of their models."""

    def fill(self, name: str, below: tuple[str, ...] = ()) -> Any:
        """A training's section with what it leaves out. What is wrong with it is said where it is
        validated.
        """
        if name in self.filled or not isinstance(self.given[name], dict | None):
            return self.filled.get(name, self.given[name])
        section = self._inherit(self.given[name] or {}, (*below, name))
        root_name = self.root.resolve().name
        run_name = root_name if len(self.given) == 1 else f"{root_name}-{name}"
        # relative to the working directory, like `root`: MLflow resolves it where the run is started
        tracking = {"uri": sqlite_uri(_beside(self.root) / "mlflow.db"), "run_name": run_name}
        section = {
            **section,
            "output_dir": section.get("output_dir", self.root / name),
            "tracking": {**tracking, **(section.get("tracking") or {})},
        }
        if self.held_out_share:
            data = {"held_out_share": self.held_out_share, **(section.get("data") or {})}
            section = {**section, "data": data}
        every = _with_columns(section, self.columns)
        try:
            draft = TrainingConfig.model_validate(every)
        except ValidationError:
            self.filled[name] = every
        else:
            usable = {kind: one for kind, one in self.columns.items() if kind in draft.readable}
            self.models[name] = draft.model.model_dump(mode="json")
            self.filled[name] = _with_columns(section, usable)
        return self.filled[name]

    def _inherit(self, section: dict[str, Any], below: tuple[str, ...]) -> dict[str, Any]:
        """The section, its model with the fields of the training that it goes on from."""
        start = Reference.of(section.get("init_from"))
        if start is None or start.stage in below or start.stage not in self.given:
            return section
        self.fill(start.stage, below)
        model = continued_fields(self.models.get(start.stage, {}), section.get("model") or {})
        return {**section, "model": model}


def _beside(root: Path) -> Path:
    """The folder that holds a root, the same however the root is spelled: by `.` or through a link too."""
    real = root.resolve().parent
    return root.parent if root.parent.resolve() == real else real


def _with_columns(section: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A training's section that reads the workflow's images and its columns of these names, by kind, unless
    it says otherwise.
    """
    data = section.get("data") or {}
    read = {kind: f"stage:{name}" for kind, name in columns.items()} | dict(data.get("columns") or {})
    return {**section, "data": {"images": "stage:curate", **data, "columns": read}}


def _defaults(columns: Mapping[str, Any]) -> dict[str, str]:
    """The column of each kind that a training reads unless it says otherwise: that of the kind's name, or the
    first.
    """
    found: dict[str, str] = {}
    for name, one in columns.items():
        kind = _kind(one)
        if kind is not None and (kind not in found or name == kind):
            found[kind] = name
    return found


def _in_order(trainings: Mapping[str, TrainingConfig]) -> list[str]:
    """Names of the trainings, each after the one that it goes on from; else in the order of the file."""
    above = {
        name: [start.stage] if (start := Reference.of(one.init_from)) else []
        for name, one in trainings.items()
    }
    try:
        return list(TopologicalSorter(above).static_order())
    except CycleError as error:
        raise ValueError(f"trainings: {' -> '.join(error.args[1])} go on from each other") from error
