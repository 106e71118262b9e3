"""What runs in an evaluation's own process: idle beside a training, its scores and its end told to MLflow.

Nothing heavy is imported with this module: the imports too are work for idle time.
"""

import importlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runtime.pace import Pace

if TYPE_CHECKING:
    from repfusion.evaluation.record import EvaluationConfig
    from repfusion.tracking import Tracker

TRACKING = ("repfusion.tracking", "mlflow")
"""Modules to import, in this order: the first decides settings that the other reads when it is imported."""
RUN_FILE = "run.json"


def import_heavy(pace: Pace, *names: str) -> None:
    for name in names:
        pace(partial(importlib.import_module, name))


class Evaluator:
    """One attempt at one checkpoint: an actor of Ray, and so a process that can be killed on its own."""

    def __init__(self, task: dict[str, Any]):
        self.task, self.pace = task, Pace(task["is_idle"])
        # the training's and the checkpoints' paths are relative to the driver's
        os.chdir(task["directory"])

    def waited_sec(self) -> float:
        """Answers once the process is up."""
        return self.pace.waited_sec()

    def lift(self) -> None:
        self.pace.lift()

    def help(self) -> int:
        """Draws and judges beside the process that evaluates, until nothing is left to share; of how many
        parts.
        """
        import_heavy(self.pace, "torch", "repfusion.evaluation.checkpoints")
        from repfusion.evaluation.checkpoints import help_evaluate

        return help_evaluate(*self._asked(), self.pace)

    def _asked(self) -> "tuple[Path, Path, EvaluationConfig]":
        """The checkpoint, where its evaluation lies, and what it is made with."""
        import torch

        from repfusion.evaluation.record import EvaluationConfig

        torch.set_num_threads(self.task["num_threads"])
        config = EvaluationConfig.model_validate(self.task["config"])
        return Path(self.task["checkpoint"]), Path(self.task["out"]), config

    def evaluate(self) -> None:
        """Scores the checkpoint unless that was done, then logs the scores at its step unless that was done.

        What is short and holds the tracking database is not idle: a training that waits for it would wait for
        a process that waits for the training.
        """
        task = self.task
        import_heavy(
            self.pace, "torch", "repfusion.evaluation.checkpoints", *(TRACKING if task["tracking"] else ())
        )
        from pipelines.evaluation.records import LOGGED, finished
        from repfusion.evaluation.checkpoints import evaluate_checkpoint
        from repfusion.evaluation.record import GALLERIES, GALLERY, SCORES
        from repfusion.files import write_json
        from repfusion.runs.folder import step_of

        checkpoint, out, config = self._asked()
        step = step_of(checkpoint)
        tracker = attach(task["tracking"])
        child = None if tracker is None else open_child(tracker, task)
        if child is not None:
            write_json(out / RUN_FILE, {"run_id": child.run_id, "attempt": task["attempt"]})
        evaluation = finished(out, config)
        if evaluation is None:
            (out / LOGGED).unlink(missing_ok=True)
            evaluation = evaluate_checkpoint(checkpoint, out, config, self.pace)
        if tracker is None or child is None:
            return
        metrics, best_by = evaluation.metrics(), evaluation.best_metric(task["best_by"])
        child.log_metrics(metrics, step)
        if task["is_scheduled"] and not (out / LOGGED).exists():
            tracker.log_scores(step, metrics, best_by=best_by if best_by in metrics else None)
            tracker.log_image(out / GALLERY, "gallery", step)
            for picture in sorted((out / GALLERIES).glob("*.png")):
                tracker.log_image(picture, f"gallery/{picture.stem}", step)
            tracker.log_artifact(out / SCORES, f"evaluate/{checkpoint.name}")
            write_json(out / LOGGED, {"run_id": tracker.run_id, "step": step})
        elif not task["is_scheduled"]:
            for name in (GALLERY, SCORES):
                child.log_artifact(out / name)
        child.finish("FINISHED")


def attach(tracking: dict[str, Any] | None, run_id: str | None = None) -> "Tracker | None":
    """The training's run, or the one with this id; None where nothing is tracked."""
    if tracking is None:
        return None
    from repfusion.tracking import Tracker, TrackingConfig

    config = TrackingConfig.model_validate(tracking)
    return Tracker(config.model_copy(update={"run_id": run_id or config.run_id}), attach=True)


def open_child(tracker: "Tracker", task: dict[str, Any]) -> "Tracker":
    """A nested run for one attempt."""
    name = Path(task["checkpoint"]).name
    tags = {"checkpoint": task["checkpoint"], "attempt": str(task["attempt"])}
    return tracker.child(name=f"evaluate {name}", tags=tags)


def report_failure(task: dict[str, Any], run_id: str | None, status: str, error: str, traceback: str) -> None:
    """Runs in a Ray worker: ends the nested run of an attempt, which its own process could not; makes it
    where that had not come so far.
    """
    os.chdir(task["directory"])
    import_heavy(Pace(task["is_idle"]), *TRACKING)
    tracker = attach(task["tracking"], run_id)
    assert tracker is not None
    child = tracker if run_id is not None else open_child(tracker, task)
    child.owns_run = True
    child.set_tag("error", error)
    child.log_text(traceback, "traceback.txt")
    child.finish(status)


def report_missed(directory: str, tracking: dict[str, Any], steps: list[int]) -> None:
    """Runs in a Ray worker: tags the training's run with the checkpoints that were gone too early."""
    os.chdir(directory)
    import_heavy(Pace(True), *TRACKING)
    tracker = attach(tracking)
    assert tracker is not None
    tracker.set_tag("evaluate.missed_steps", " ".join(map(str, steps)))
    tracker.set_tag("evaluate.num_missed", str(len(steps)))
