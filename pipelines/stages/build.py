"""A workflow's configuration -> its stages, each with the fields that decide its bytes and what to run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from pipelines.config import StageName, WorkflowConfig
from pipelines.dag import Place, ShardStage, Stage
from pipelines.sources.base import Entries
from pipelines.sources.build import source_of
from pipelines.stages.captions import captions_stage
from pipelines.stages.curate import curate_stage
from pipelines.stages.evaluate import evaluate_stage
from pipelines.stages.image_features import image_features_stage
from pipelines.stages.judge import judge_stage
from pipelines.stages.prompt_features import prompt_features_stage
from pipelines.stages.report import report_stage
from pipelines.stages.train import train_stage
from pipelines.workflow.digests import Digests
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.model.build import columns_of


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
    train, ray = config.train, config.ray
    for name in wanted:
        match name:
            case "judge":
                stages[name] = judge_stage(config.curate, stages["ingest"], place)
            case "curate":
                stages[name] = curate_stage(config.curate, stages["ingest"], stages["judge"], place)
            case "captions":
                stages[name] = captions_stage(name, config.captions, stages["curate"], place)
            case "latents":
                stages[name] = image_features_stage(
                    name, config.latents, train.model.encoder, stages["curate"], place
                )
            case "features":
                stages[name] = prompt_features_stage(
                    name,
                    config.features,
                    train.model.mllm,
                    train.model.mllm_dtype,
                    stages["curate"],
                    stages.get("captions"),
                    tuple(config.captions.columns),
                    place,
                )
            case "train":
                reads_prompts = PROMPT_FEATURES in columns_of(train.model)
                columns = ["curate", "latents", "captions", *(["features"] if reads_prompts else [])]
                above = tuple(stages[one] for one in columns if one in stages)
                ranks = config.num_train_workers, config.train_max_failures
                stages[name] = train_stage(train, *ranks, above, config.evaluate, ray, place)
            case "evaluate":
                stages[name] = evaluate_stage(config.evaluate, train, ray, stages["train"], place)
            case "report":
                began = time.perf_counter() if started is None else started
                stages[name] = report_stage(stages["evaluate"], began, place)
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
