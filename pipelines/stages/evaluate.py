"""The evaluate stage.

train/evaluations/step_00000500/   where an evaluation writes; set aside together with a stale training
evaluate/step_00000500/            what the stage publishes once all are done: scores.json, gallery.png
"""

import shutil
import time
from pathlib import Path
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.session import RayConfig, StageError, ray_session
from pipelines.shards.digests import flatten
from pipelines.shards.manifest import Upstream
from pipelines.shards.storage import Folder
from repfusion.evaluation.record import GALLERY, SCORES, Evaluation
from repfusion.files import atomic_path
from repfusion.runs.folder import step_of
from repfusion.train import TrainConfig


def publish(source: Path, target: Path) -> None:
    """Copies an evaluation; `scores.json`, which marks it complete, comes last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (GALLERY, SCORES):
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def summarise(evaluation: Evaluation, step: int) -> dict[str, Any]:
    """One checkpoint's line in the summary."""
    return {
        "step": step,
        "suites": {
            name: {
                "headline": one.scores.headline,
                "num_items": one.num_items,
                "values": one.scores.values,
                "intervals": {value: (i.low, i.high) for value, i in one.scores.intervals.items()},
            }
            for name, one in evaluation.suites.items()
        },
        "checkpoint": evaluation.checkpoint,
        "seconds": evaluation.seconds,
    }


def run_evaluate(config: EvaluateConfig, train: TrainConfig, ray: RayConfig, root: Path) -> dict[str, Any]:
    """Finishes what was not evaluated beside the training, and publishes all of it under `root`.

    Raises:
        StageError: an evaluation failed, with its error, or there is no checkpoint.
    """
    scheduler = EvaluationScheduler(config, train)
    if not scheduler.checkpoints():
        raise StageError(f"evaluate: {train.output_dir}/checkpoints holds no complete checkpoint")
    started = time.perf_counter()
    with ray_session(ray):
        found = scheduler.finish()
    if not found:
        raise StageError("evaluate: all checkpoints that were to be evaluated are gone")
    for folder, _ in found:
        publish(folder, root / "evaluate" / folder.name)
    with atomic_path(root / GALLERY) as temporary:
        shutil.copyfile(found[-1][0] / GALLERY, temporary)
    evaluations = [summarise(evaluation, step_of(folder)) for folder, evaluation in found]
    waited_sec = round(time.perf_counter() - started, 3)
    return {"evaluations": evaluations, "missed": sorted(scheduler.missed), "waited_sec": waited_sec}


def evaluate_stage(
    config: EvaluateConfig, train: TrainConfig, ray: RayConfig, trained: Stage, place: Place
) -> WholeStage:
    """The stage `evaluate` of the checkpoints that the stage `trained` leaves."""

    def execute(above: Upstream) -> dict[str, Any]:
        return run_evaluate(config, train, ray, place.root)

    fields, folder = flatten(config.decides, "evaluate."), Folder(str(place.root / "evaluate"))
    return WholeStage("evaluate", fields, folder, (trained,), execute)
