"""A workflow's configuration -> its stages, each with the fields that decide its bytes and what to run."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import WorkflowConfig
from pipelines.dag import Place, ShardStage, Stage, WholeStage, with_texts
from pipelines.limits import TextReader, caption_limits
from pipelines.shards.digests import Digests, require_folder
from pipelines.shards.storage import Folder
from pipelines.sources.base import Entries
from pipelines.sources.build import source_of
from pipelines.stages.caption_arrays import Reading
from pipelines.stages.captions import CaptionsConfig, captions_stage
from pipelines.stages.codes.column import CodesConfig, codes_stage
from pipelines.stages.codes.tokenizer import TOKENIZER, tokenizer_folder, tokenizer_stage
from pipelines.stages.curate import curate_stage
from pipelines.stages.decoder import DECODER, decoder_stage
from pipelines.stages.evaluate import evaluate_stage
from pipelines.stages.image_features import (
    ImageFeaturesConfig,
    VideoFeaturesConfig,
    image_features_stage,
    video_features_stage,
)
from pipelines.stages.judge import judge_stage
from pipelines.stages.prompt_features import PromptFeaturesConfig, prompt_features_stage
from pipelines.stages.report import report_stage
from pipelines.stages.rewrites import RewritesConfig, rewrites_stage
from pipelines.stages.train import Reference, train_stage
from repfusion.config import naming
from repfusion.data.config import CAPTION, CAPTIONS
from repfusion.devices.placing import precision_of
from repfusion.model.config import ModelConfig
from repfusion.model.discrete.illume import IllumeConfig
from repfusion.model.discrete.unidisc import UniDiscConfig


def build_stages(
    config: WorkflowConfig, started: float | None = None, place: Place | None = None
) -> list[Stage]:
    """The stages up to `last_stage`, in an order in which each follows what it reads. `started` is when the
    run began (perf_counter); `place` is the workflow's own unless given.

    Raises:
        ValueError: where a url list, a weights folder or a column of a data set of the mix is missing, or a
            column is to be made by two models.
    """
    names = config.stage_names
    place = place or Place(config.data_folder, config.root, Digests(config.root))
    first = source_of(config.source, config.ingest).stages(config.ingest, place)
    found: dict[str, Stage] = {stage.name: stage for stage in first}
    for name in names[: names.index(config.last_stage) + 1]:
        match name:
            case "source" | "ingest":
                pass  # the source's own
            case "judge":
                readers = _text_readers(config, CAPTION)
                limits = caption_limits(readers, config.curate.max_caption_tokens, place.digests)
                are_clips = config.ingest.clips is not None
                found[name] = judge_stage(config.curate, limits, found["ingest"], place, are_clips)
            case "curate":
                found[name] = curate_stage(config.curate, found["ingest"], found["judge"], place)
            case "evaluate":
                training = config.training(config.scored)
                found[name] = evaluate_stage(
                    config.evaluate, training, config.ray, found[config.scored], place
                )
            case "report":
                began = time.perf_counter() if started is None else started
                found[name] = report_stage(
                    config.scored,
                    config.trainings[config.scored].tracking,
                    found["evaluate"],
                    began,
                    place,
                )
            case "tokenizer":
                assert config.tokenizer is not None
                found[name] = tokenizer_stage(config.tokenizer, found["curate"], place)
            case "decoder":
                found[name] = _decoder(config, found["curate"], place)
            case _ if name in config.columns:
                found[name] = _column(config, name, found, place)
            case _:
                found[name] = _training(config, name, found, place)
    stages = [found[name] for name in names[: names.index(config.last_stage) + 1] if name in found]
    return with_texts(stages, config.written)


def _column(config: WorkflowConfig, name: str, above: Mapping[str, Stage], place: Place) -> ShardStage:
    images = above["curate"]
    match column := config.columns[name]:
        case CaptionsConfig():
            limits = {
                caption: caption_limits(
                    _text_readers(config, f"{caption}.{CAPTION}", name), one.max_tokens, place.digests
                )
                for caption, one in column.captions.items()
            }
            return captions_stage(name, column, limits, images, place)
        case ImageFeaturesConfig():
            encoder, key = _maker(config, name, "encoder", column.encoder)
            return image_features_stage(name, column, encoder, key, images, place)
        case CodesConfig():
            tokenizer, key = _maker(config, name, "tokenizer", column.tokenizer)
            is_own = Reference.of(tokenizer) is not None
            folder = tokenizer_folder(place.root) if is_own else tokenizer
            made_by = above[TOKENIZER] if is_own else None
            return codes_stage(name, column, folder, key, images, made_by, place)
        case VideoFeaturesConfig():
            return video_features_stage(name, column, images, place)
        case PromptFeaturesConfig() | RewritesConfig():
            mllm, key = _maker(config, name, "mllm", column.mllm)
            if column.mllm_dtype == "auto":
                mllm_dtype = precision_of("auto", column.actors.num_gpus > 0)
            else:
                mllm_dtype, _ = _maker(config, name, "mllm_dtype", column.mllm_dtype)
            captions = _captions(config, name)
            reading = Reading(
                mllm,
                key,
                mllm_dtype,
                images,
                None if captions is None else above[captions],
                () if captions is None else tuple(config.columns[captions].captions),
            )
            if isinstance(column, RewritesConfig):
                _check_system(config, name, column)
                return rewrites_stage(name, column, reading, place)
            return prompt_features_stage(name, column, reading, place)


def _decoder(config: WorkflowConfig, images: Stage, place: Place) -> WholeStage:
    """The stage of the workflow's decoder. Raises ValueError where nothing says what it decodes, or two
    differ.
    """
    assert config.decoder is not None
    own = config.decoder.encoder
    said = {} if own is None else {f"{DECODER}.encoder": own}
    for name in config.decoded:
        model = config.trainings[name].model
        assert isinstance(model, ModelConfig)
        said[f"trainings.{name}.model.encoder"] = model.encoder
    if not said:
        raise ValueError(
            f"{DECODER}.encoder: no training's model.decoder is stage:{DECODER}; say what it decodes"
        )
    (key, encoder), *others = said.items()
    for other, another in others:
        if another != encoder:
            raise ValueError(f"{other} is {another}, but the decoder is of {key}, which is {encoder}")
    return decoder_stage(config.decoder, encoder, key, images, place)


def _maker(config: WorkflowConfig, column: str, field: str, own: Any) -> tuple[Any, str]:
    """What a column is made by, its own or that of the trainings that read it, and the key that says so.

    Raises:
        ValueError: two of them differ.
    """
    said = {} if own is None else {f"columns.{column}.{field}": own}
    for name in config.readers(column):
        said[f"trainings.{name}.model.{field}"] = getattr(config.trainings[name].model, field)
    (key, value), *others = said.items()
    for other, another in others:
        if another != value:
            raise ValueError(
                f"{other} is {another}, but the column {column!r} that this training reads is made by {key}, "
                f"which is {value}; give the training a column of its own"
            )
    return value, key


def _check_system(config: WorkflowConfig, name: str, column: RewritesConfig) -> None:
    """Raises ValueError where a training that reads the rewritings asks in other words."""
    for reader in config.readers(name):
        method = getattr(config.trainings[reader].model, "conditioning", None)
        habit = getattr(method, "rewriting", None)
        if habit is None or habit.system != column.system:
            asked = "rewrites nothing" if habit is None else f"rewrites under {habit.system!r}"
            raise ValueError(
                f"trainings.{reader}.model.conditioning.rewriting {asked}, but its column {name!r} was "
                f"rewritten under {column.system!r}: give both the same system prompt"
            )


def _captions(config: WorkflowConfig, column: str) -> str | None:
    """The column of alternative captions whose prompt features a column holds: that of its readers.

    Raises:
        ValueError: they read several.
    """
    read = [config.trainings[name].columns_read.get(CAPTIONS) for name in config.readers(column)]
    found = list(dict.fromkeys(one for one in read if one is not None))
    if len(found) > 1:
        raise ValueError(
            f"columns.{column}: its trainings read captions of {' and '.join(found)}, prompt features are of "
            "one column of captions; give each training prompt features of its own"
        )
    return found[0] if found else None


def _text_readers(config: WorkflowConfig, caption: str, column: str | None = None) -> Iterator[TextReader]:
    """The language models that read a caption, `txt` or `NAME.txt` of a column of captions: those of the
    trainings that draw it, and of the columns of its prompt features.
    """
    for name, training in config.trainings.items():
        data, model = training.data, training.model
        place = data.images if column is None else data.columns.get(CAPTIONS)
        reference = Reference.of(place)
        is_ours = reference is not None and reference.stage == (column or "curate")
        if not (is_ours and data.caption_weights.get(caption, 0) > 0):
            continue
        match model:
            case ModelConfig():
                require_folder(model.encoder.path, key := f"trainings.{name}.model.encoder.path")
                with naming(key):
                    num_beside = model.tokens_beside
                yield TextReader(f"trainings.{name}.model.mllm", model.mllm, num_beside)
            case IllumeConfig():
                if Reference.of(model.tokenizer) is None:
                    num_beside = model.tokens_beside
                    yield TextReader(f"trainings.{name}.model.mllm", model.mllm, num_beside)
            case UniDiscConfig():
                yield TextReader(f"trainings.{name}.model.text", model.text, 0, model.text_length - 1)
    for name in config.made_columns:
        match config.columns[name]:
            case PromptFeaturesConfig(mllm=own) | RewritesConfig(mllm=own) if (
                column is None or _captions(config, name) == column
            ):
                mllm, key = _maker(config, name, "mllm", own)
                yield TextReader(key, mllm, 0)


def _training(config: WorkflowConfig, name: str, above: Mapping[str, Stage], place: Place) -> WholeStage:
    training = config.trainings[name]
    start = Reference.of(training.init_from)
    upstream = ["curate", *training.columns_read.values(), *([] if start is None else [start.stage])]
    if training.own_decoder is not None:
        upstream.append(DECODER)
    if training.own_tokenizer is not None:
        upstream.append(TOKENIZER)
    return train_stage(
        name,
        training,
        tuple(above[one] for one in upstream),
        None if start is None else config.trainings[start.stage].output_dir,
        config.evaluate if name == config.scored else None,
        config.ray,
        place,
    )


def data_stages(config: WorkflowConfig) -> list[ShardStage]:
    """The stages that are made of shards, source to the last column, but for those that wait for a training
    (codes of the workflow's own tokenizer).
    """
    return [stage for stage in build_stages(config) if isinstance(stage, ShardStage) and not stage.made_by]


def kept_stages(config: WorkflowConfig) -> list[Stage]:
    """All stages that are made of shards, and those that these wait for."""
    stages = build_stages(config)
    waited = {name for stage in stages if isinstance(stage, ShardStage) for name in stage.made_by}
    return [stage for stage in stages if isinstance(stage, ShardStage) or stage.name in waited]


def source_entries(config: WorkflowConfig) -> Entries:
    """How many entries the source has, and how to take a few."""
    return source_of(config.source, config.ingest).entries()


def probe_stages(config: WorkflowConfig) -> Callable[[Path], list[ShardStage]]:
    """The data stages with their folders under a path; duplicates stay: a few samples say nothing of them."""

    def build(scratch: Path) -> list[ShardStage]:
        changes = {
            "curate": config.curate.model_copy(update={"duplicates": "keep", "max_drop_fraction": 1.0}),
            "ingest": config.ingest.model_copy(update={"max_drop_fraction": 1.0}),
        }
        # with the digests of the real root, or each plan would read all weights again
        place = Place(Folder.at(scratch), scratch, Digests(config.root))
        stages = build_stages(config.model_copy(update=changes), place=place)
        return [stage for stage in stages if isinstance(stage, ShardStage) and not stage.made_by]

    return build
