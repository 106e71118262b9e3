"""Evaluations that somebody asks for: `python -m pipelines evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.config import WorkflowConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.records import best_checkpoint, config_digest, finished
from pipelines.evaluation.schedule import CONFIG, EvaluationScheduler
from pipelines.runtime.session import RayConfig, ray_session
from repfusion.config import Config, load_config
from repfusion.evaluation.shown import by_part
from repfusion.runs.completion import latest_whole
from repfusion.runs.folder import COMPLETE, RunFolder, complete_checkpoints, step_of
from repfusion.train import TrainConfig


class _Means(Config):
    """What a training folder does not say, and `key.path=value` may."""

    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()


class Target(NamedTuple):
    """A training whose checkpoints are to be evaluated now, and by what means."""

    train: TrainConfig
    evaluate: EvaluateConfig
    ray: RayConfig
    checkpoint: Path | None
    """The only one, where a checkpoint was named."""


def find_target(path: Path, overrides: Sequence[str] = ()) -> Target:
    """What somebody may name: a workflow's YAML file or root, a training's folder, one of its checkpoints.

    Raises:
        ValueError: it is none of these; ConfigError: an override that does not hold.
    """
    path = Path(path)
    checkpoint = path if (path / COMPLETE).is_file() else None
    if checkpoint is not None:
        step_of(checkpoint)
    workflow = path / "config.yaml" if (path / "config.yaml").is_file() else path
    if not workflow.is_dir():
        config = load_config(WorkflowConfig, workflow, overrides)
        return Target(config.training(config.scored), config.evaluate, config.ray, None)
    folder = path if checkpoint is None else checkpoint.parent.parent
    if not (folder / CONFIG).is_file() and (folder / "train" / CONFIG).is_file():
        folder = folder / "train"
    if not (folder / CONFIG).is_file() or not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{path}: neither a workflow (YAML file or root), nor a training (config.json, checkpoints/), "
            "nor a checkpoint in one; 'python -m repfusion.evaluation CHECKPOINT' scores a checkpoint alone"
        )
    saved = json.loads((folder / CONFIG).read_text())
    train = TrainConfig.model_validate({**saved, "output_dir": folder})
    means = _means(folder, overrides)
    return Target(train, means.evaluate, means.ray, checkpoint)


def _means(folder: Path, overrides: Sequence[str]) -> _Means:
    """The means of the training's own schedule, where it has one, with overrides."""
    path = folder / "evaluations" / CONFIG
    saved = {"evaluate": json.loads(path.read_text())} if path.is_file() else {}
    return load_config(_Means, saved, overrides)


def choose(target: Target, step: str) -> list[Path]:
    """Checkpoints by `step`: a number, `latest`, `best` of those that have scores, or `all`.

    Raises:
        ValueError: there is none such; the message names those that there are.
    """
    if target.checkpoint is not None:
        if step not in ("latest", str(step_of(target.checkpoint))):
            raise ValueError(
                f"step {step}: {target.checkpoint} is one checkpoint; name its training's folder"
            )
        return [target.checkpoint]
    root = RunFolder(target.train.output_dir).checkpoints
    found = complete_checkpoints(root)
    if not found:
        raise ValueError(f"{root} holds no complete checkpoint")
    match step:
        case "all":
            return found
        case "latest":
            whole = latest_whole(root)
            return [] if whole is None else [whole]
        case "best":
            best = best_checkpoint(found, RunFolder(target.train.output_dir).evaluations, _scheduled(target))
            if best is None:
                raise ValueError(f"step best: none of the {len(found)} checkpoints in {root} has scores yet")
            return [best]
    chosen = [path for path in found if step.isdecimal() and step_of(path) == int(step)]
    if not chosen:
        steps = ", ".join(str(step_of(path)) for path in found)
        raise ValueError(f"step {step}: expected latest, best, all or one of {steps} (in {root})")
    return chosen


def _scheduled(target: Target) -> EvaluateConfig:
    """What the training's own evaluations are made with."""
    path = RunFolder(target.train.output_dir).evaluations / CONFIG
    return EvaluateConfig.model_validate_json(path.read_text()) if path.is_file() else target.evaluate


def evaluate_now(path: Path, step: str, overrides: Sequence[str] = (), is_urgent: bool = False) -> None:
    """Evaluates checkpoints because somebody asks, and prints their scores; beside a training, in idle time
    unless it `is_urgent`.

    With the configuration of the training's own schedule, the scores are as if that had made them; another
    one leaves them in a folder and an MLflow run of their own.

    Raises:
        ValueError: no such checkpoint. StageError: an evaluation failed; the others are complete.
    """
    target = find_target(path, overrides)
    chosen, scoring = choose(target, step), target.evaluate.scoring
    is_scheduled = scoring == _scheduled(target).scoring
    scheduler = EvaluationScheduler(
        target.evaluate, target.train, None if is_scheduled else config_digest(scoring)[:8]
    )
    with ray_session(target.ray):
        scheduler.run(chosen, is_idle=not is_urgent)
    for checkpoint in chosen:
        folder = scheduler.jobs.place(checkpoint)
        evaluation = finished(folder, scoring)
        if evaluation is None:
            print(f"step {step_of(checkpoint)}: missed, its checkpoint is gone")
            continue
        print(f"step {step_of(checkpoint)}: {by_part(evaluation)}; {folder}")
