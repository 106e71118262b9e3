"""A workflow's configuration -> its stages, each with the fields that decide its bytes and what to run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pipelines.config import StageName, WorkflowConfig
from pipelines.dag import Place, ShardStage, Stage, WholeStage
from pipelines.duplicates.find import DUPLICATES, find_duplicates
from pipelines.runtime.session import in_worker
from pipelines.shards.manifest import MANIFEST, ShardTable, Upstream
from pipelines.shards.storage import Folder
from pipelines.sources.base import Entries
from pipelines.sources.build import source_of
from pipelines.stages import captions, curate, image_features, judge, prompt_features
from pipelines.workflow.digests import Digests, flatten
from pipelines.workflow.inspection import MIX
from pipelines.workflow.summary import write_summary
from repfusion.data.columns import manifest_digest
from repfusion.data.config import DataConfig
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.model.build import columns_of

STATISTICS = "statistics.safetensors"
NOT_BYTES = (
    "output_dir",
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
    "micro_batch_size",
    "attention",
    "num_threads",
)
"""Fields of `train.engine` by which its weights differ in rounding alone, as they do by the number of ranks:
a training goes on from its checkpoint on other hardware.
"""


def build_stages(
    config: WorkflowConfig, started: float | None = None, digests: Digests | None = None
) -> list[Stage]:
    """The stages up to `last_stage`, in an order in which each follows what it reads. `started` is when the
    run began (perf_counter); `digests` are those remembered in the root unless given.

    Raises:
        ValueError: where a url list, a weights folder or a column of a data set of the mix is missing.
    """
    last = get_args(StageName).index(config.last_stage)
    absent = {
        "captions": not config.captions.columns,
        "features": not config.features.enabled,
    }
    wanted = [name for name in get_args(StageName)[: last + 1] if not absent.get(name)]
    digests = digests or Digests(config.root)
    place = Place(config.data_folder, config.root, digests)
    first = source_of(config.source).stages(config.ingest, place)
    stages: dict[str, Stage] = {stage.name: stage for stage in first if stage.name in wanted}
    for name in wanted:
        match name:
            case "judge":
                stages[name] = _judge(config, stages["ingest"])
            case "curate":
                stages[name] = _curate(config, stages["ingest"], stages["judge"])
            case "captions":
                stages[name] = _captions(config, stages["curate"], digests)
            case "latents":
                stages[name] = _latents(config, stages["curate"], digests)
            case "features":
                stages[name] = _features(config, stages["curate"], stages.get("captions"), digests)
            case "train":
                stages[name] = _train(config, stages, digests)
            case "evaluate":
                stages[name] = _evaluate(config, stages["train"])
            case "report":
                stages[name] = _report(
                    config, stages["evaluate"], time.perf_counter() if started is None else started
                )
    return list(stages.values())


def data_stages(config: WorkflowConfig) -> list[ShardStage]:
    """Those made of shards: source to features."""
    return [stage for stage in build_stages(config) if isinstance(stage, ShardStage)]


def source_entries(config: WorkflowConfig) -> Entries:
    """How many entries the source has, and how to take a few."""
    return source_of(config.source).entries()


def probe_stages(config: WorkflowConfig) -> Callable[[Path], list[ShardStage]]:
    """The data stages with their folders under a path; duplicates stay: a few samples say nothing of them."""

    def build(scratch: Path) -> list[ShardStage]:
        changes = {
            "root": scratch,
            "data_url": None,
            "storage_options": {},
            "curate": config.curate.model_copy(update={"duplicates": "keep", "max_drop_fraction": 1.0}),
            "ingest": config.ingest.model_copy(update={"max_drop_fraction": 1.0}),
        }
        # with the digests of the real root, or each plan would read all weights again
        stages = build_stages(config.model_copy(update=changes), digests=Digests(config.root))
        return [stage for stage in stages if isinstance(stage, ShardStage)]

    return build


def _judge(config: WorkflowConfig, raw: Stage) -> ShardStage:
    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        # in a task: its memory grows with the number of samples, the driver's must not
        return in_worker(find_duplicates, folder, shards, config.curate)

    fields, folder = curate.judge_fields(config.curate), config.data_folder / "judge"
    arguments = {"source": raw.folder, "config": config.curate}
    actors = config.curate.actors
    return ShardStage("judge", fields, folder, (raw,), judge.JudgeWorker, arguments, actors, finish=finish)


def _curate(config: WorkflowConfig, raw: Stage, judged: Stage) -> ShardStage:
    fields, folder = curate.curate_fields(config.curate), config.data_folder / "curate"
    arguments = {"source": raw.folder, "judged": judged.folder, "config": config.curate}
    return ShardStage(
        "curate",
        fields,
        folder,
        (raw, judged),
        curate.CurateWorker,
        arguments,
        config.curate.actors,
        stage_files=(("judge", DUPLICATES),),
    )


def _captions(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        return captions.count_coverage(config.captions, folder, shards)

    return ShardStage(
        "captions",
        captions.fingerprint_fields(config.captions, digests.url),
        config.data_folder / "captions",
        (images,),
        captions.CaptionsWorker,
        {"source": images.folder, "config": config.captions},
        config.captions.actors,
        finish=finish,
    )


def _latents(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    encoder = config.train.model.encoder
    digest = digests.folder(encoder.path, "train.model.encoder.path")

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        image_features.merge_statistics(folder, shards.names, STATISTICS)
        return [STATISTICS]

    fields, folder = image_features.fingerprint_fields(encoder, digest), config.data_folder / "latents"
    arguments = {"source": images.folder, "config": config.latents, "encoder": encoder}
    return ShardStage(
        "latents",
        fields,
        folder,
        (images,),
        image_features.LatentsWorker,
        arguments,
        config.latents.actors,
        finish=finish,
    )


def _features(config: WorkflowConfig, images: Stage, others: Stage | None, digests: Digests) -> ShardStage:
    """`others` is the stage of alternative captions."""
    model, names = config.train.model, tuple(config.captions.columns)
    digest = digests.folder(model.mllm, "train.model.mllm")
    arguments = {
        "source": images.folder,
        "config": config.features,
        "mllm": model.mllm,
        "mllm_dtype": model.mllm_dtype,
        "captions": None if others is None else others.folder,
        "names": names,
    }
    fields = prompt_features.fingerprint_fields(digest, model.mllm_dtype, config.features, names)
    folder = config.data_folder / "features"
    above = (images,) if others is None else (images, others)
    return ShardStage(
        "features", fields, folder, above, prompt_features.FeaturesWorker, arguments, config.features.actors
    )


def _train(config: WorkflowConfig, stages: Mapping[str, Stage], digests: Digests) -> WholeStage:
    values = config.train.model_dump(mode="json", exclude=set(NOT_BYTES))
    values["engine"] = {key: value for key, value in values["engine"].items() if key not in ROUNDING}
    fields = flatten(values, "train.")
    model = config.train.model
    for key, path in {
        "train.model.encoder.path": model.encoder.path,
        "train.model.mllm": model.mllm,
        "train.model.decoder": model.decoder,
        "train.init_from": config.train.init_from,
    }.items():
        fields[key] = None if path is None else digests.folder(path, key)
    fields["train.data.caption_weights"] = config.train.data.caption_weights
    fields |= _mixed_data(config.train.data)
    upstream = [stages["curate"], stages["latents"]]
    if "captions" in stages:
        upstream.append(stages["captions"])
    if PROMPT_FEATURES in columns_of(model) and "features" in stages:
        upstream.append(stages["features"])

    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.stages.train import run_train

        return run_train(config)

    return WholeStage("train", fields, _local(config, "train"), tuple(upstream), execute)


def _mixed_data(data: DataConfig) -> dict[str, Any]:
    """Of the data sets mixed into the workflow's own: the digests of their columns, and how often they are
    drawn. Raises ValueError, naming the config key, where a column is not complete.
    """
    fields: dict[str, Any] = {}
    if data.mix and data.weight != 1:
        fields["train.data.weight"] = data.weight
    for name, dataset in sorted(data.mix.items()):
        fields[f"{MIX}{name}.weight"] = dataset.weight
        fields[f"{MIX}{name}.caption_weights"] = dataset.caption_weights
        for column, folder in dataset.folders.items():
            digest = fields[f"{MIX}{name}.{column}"] = manifest_digest(folder)
            if digest is None:
                raise ValueError(
                    f"{MIX}{name}.{column}: {folder} holds no complete stage (no {MANIFEST}); expected "
                    "a local folder that a workflow wrote: run that workflow to its end, or correct the path"
                )
    return fields


def _evaluate(config: WorkflowConfig, train: Stage) -> WholeStage:
    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.stages.evaluate import run_evaluate

        return run_evaluate(config)

    values = {**config.evaluate.scoring.model_dump(mode="json"), "every_steps": config.evaluate.every_steps}
    fields = flatten(values, "evaluate.")
    return WholeStage("evaluate", fields, _local(config, "evaluate"), (train,), execute)


def _report(config: WorkflowConfig, evaluate: Stage, started: float) -> WholeStage:
    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.reporting.report import write_report

        # the page shows the summary; its own seconds are added when the run ends
        manifests = {name: output.manifest for name, output in above.items()}
        write_summary(config.root, manifests, time.perf_counter() - started)
        write_report(config.root, config.data_folder)
        return {}

    outputs = (config.root / "report.html", config.root / "gallery.png")
    return WholeStage("report", {}, _local(config, "report"), (evaluate,), execute, outputs, needs_ray=False)


def _local(config: WorkflowConfig, name: str) -> Folder:
    return Folder(str(config.root / name))
