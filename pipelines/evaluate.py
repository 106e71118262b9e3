"""Evaluations that somebody asks for: `python -m pipelines evaluate`."""

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipelines.config import WorkflowConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.records import best_checkpoint, config_digest, finished
from pipelines.evaluation.schedule import CONFIG, EvaluationScheduler
from pipelines.runtime.session import RayConfig, ray_session
from repfusion.config import Config, load_config, validate
from repfusion.display.redaction import redact_text
from repfusion.evaluation.shown import by_part
from repfusion.runs.completion import latest_whole
from repfusion.runs.folder import COMPLETE, RunFolder, complete_checkpoints, step_of
from repfusion.tracking import TrackingConfig, sqlite_path
from repfusion.train import TrainConfig

TRACKING_URI = "MLFLOW_TRACKING_URI"


RUN_PLACES = """
SELECT artifact_uri, artifact_location FROM runs
JOIN experiments ON runs.experiment_id = experiments.experiment_id WHERE run_uuid = ?
"""
"""Where MLflow puts the files of a run and of those nested in it."""


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
    if not path.is_dir():
        config = load_config(WorkflowConfig, path, overrides)
        return Target(config.training(config.scored), config.evaluate, config.ray, None)
    if (path / "config.yaml").is_file():
        return _found_workflow(path, overrides)
    folder = path if checkpoint is None else checkpoint.parent.parent
    if not (folder / CONFIG).is_file() and (folder / "train" / CONFIG).is_file():
        folder = folder / "train"
    if not (folder / CONFIG).is_file() or not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{path}: neither a workflow (YAML file or root), nor a training (config.json, checkpoints/), "
            "nor a checkpoint in one; 'python -m repfusion.evaluation CHECKPOINT' scores a checkpoint alone"
        )
    saved = json.loads((folder / CONFIG).read_text())
    train = validate(TrainConfig, {**saved, "output_dir": folder}, str(folder / CONFIG))
    means = _means(folder, overrides)
    return Target(_tracked_by_us(train), means.evaluate, means.ray, checkpoint)


def _found_workflow(root: Path, overrides: Sequence[str]) -> Target:
    """The workflow whose config.yaml lies in its root."""
    config = load_config(WorkflowConfig, root / "config.yaml", overrides, is_data=True)
    train = config.training(config.scored)
    is_chosen = any(one.startswith(f"trainings.{config.scored}.tracking.uri=") for one in overrides)
    return Target(train if is_chosen else _tracked_by_us(train), config.evaluate, config.ray, None)


def _tracked_by_us(train: TrainConfig) -> TrainConfig:
    """A training that was found in a folder, which may be somebody else's: it is tracked where this machine's
    MLFLOW_TRACKING_URI says, or in an SQLite file beside it, and nowhere that its configuration names.
    """
    named, folder = train.tracking.uri, train.output_dir.resolve()
    if named is None:
        return train
    tracking, ours = train.tracking.model_copy(update={"artifacts": None}), os.environ.get(TRACKING_URI)
    if ours:
        return train.model_copy(update={"tracking": tracking.model_copy(update={"uri": ours})})
    database = sqlite_path(named)
    beside = (folder, *folder.parents[:2])
    if database is not None and database.resolve().parent in beside and _keeps_artifacts(database, folder):
        return train.model_copy(update={"tracking": tracking})
    print(
        f"evaluate: scores will not be tracked: {folder} names {redact_text(named)}, and what lies in a "
        f"folder chooses no address; set {TRACKING_URI}, or give the workflow's own YAML file"
    )
    return train.model_copy(update={"tracking": TrackingConfig()})


def _keeps_artifacts(database: Path, folder: Path) -> bool:
    """Whether the database says that the run's files lie beside it: it too could name any place."""
    tracked = RunFolder(folder).tracked
    if not (database.is_file() and tracked.is_file()):
        return True  # there is nothing that could say otherwise
    run_id = json.loads(tracked.read_text())["run_id"]
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            places = [place for row in connection.execute(RUN_PLACES, [run_id]) for place in row]
    except sqlite3.Error:
        return False
    root = database.resolve().parent / "mlartifacts"
    return all(urlsplit(place).scheme == "file" and _path_of(place).is_relative_to(root) for place in places)


def _path_of(uri: str) -> Path:
    return Path(url2pathname(urlsplit(uri).path)).resolve()


def _means(folder: Path, overrides: Sequence[str]) -> _Means:
    """The means of the training's own schedule, where it has one, with overrides."""
    path = folder / "evaluations" / CONFIG
    saved = {"evaluate": json.loads(path.read_text())} if path.is_file() else {}
    return load_config(_Means, saved, overrides, str(path), is_data=True)


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
            folder, num_steps = RunFolder(target.train.output_dir).evaluations, target.train.num_steps
            best = best_checkpoint(found, folder, _scheduled(target), num_steps)
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
    own = _scheduled(target)
    is_scheduled = (scoring, target.evaluate.suite_every_steps) == (own.scoring, own.suite_every_steps)
    scheduler = EvaluationScheduler(
        target.evaluate, target.train, None if is_scheduled else config_digest(scoring)[:8]
    )
    with ray_session(target.ray):
        scheduler.run(chosen, is_idle=not is_urgent)
    for checkpoint in chosen:
        folder = scheduler.jobs.place(checkpoint)
        evaluation = finished(folder, scheduler.jobs.scoring(checkpoint))
        if evaluation is None:
            print(f"step {step_of(checkpoint)}: missed, its checkpoint is gone")
            continue
        print(f"step {step_of(checkpoint)}: {by_part(evaluation)}; {folder}")
