"""Evaluations as Ray tasks, one a checkpoint: scheduled while training goes on, finished and published by the
evaluate stage.

    train/evaluations/step_00000500/   where a task writes; set aside together with a stale training
    evaluate/step_00000500/            what the stage publishes once all are done: scores.json, gallery.png
"""

import json
import os
import shutil
import time
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from pipelines.session import StageError, ray_session
from pipelines.storage import atomic_path
from pipelines.store import write_json
from repfusion.checkpoint import complete_checkpoints, step_of
from repfusion.evaluation import Evaluation, EvaluationConfig, evaluate_checkpoint, read_evaluation
from repfusion.tracking import Tracker, TrackingConfig
from repfusion.train import TrainConfig

if TYPE_CHECKING:
    from pipelines.config import WorkflowConfig

POLL_SEC = 1.0


class EvaluateConfig(EvaluationConfig):
    """Which checkpoints are evaluated, on what, and the prompts, sampler and seed of each evaluation."""

    every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this, the first and the last; None takes every checkpoint."""
    beside_training: bool = True
    """Evaluate each checkpoint as soon as it is written, or all of them after the training."""
    max_concurrent: int = Field(default=2, ge=1)
    """Evaluations at once after the training; beside it there is one."""
    num_cpus: float = Field(default=0, ge=0)
    """CPUs that each task reserves. 0 lets it run beside the ranks on a small machine, which it slows a
    little.
    """
    num_gpus: float = Field(default=0, ge=0)
    """GPUs, or a share of one, that each task reserves."""

    @property
    def scoring(self) -> EvaluationConfig:
        """What decides the scores."""
        return EvaluationConfig(**{name: getattr(self, name) for name in EvaluationConfig.model_fields})

    def includes(self, step: int, num_steps: int) -> bool:
        return self.every_steps is None or step % self.every_steps == 0 or step == num_steps


def evaluate_task(task: dict[str, Any]) -> None:
    """Runs in a Ray worker: scores a checkpoint unless that was done, then logs the scores at its step."""
    import torch

    os.chdir(task["directory"])
    torch.set_num_threads(1)
    checkpoint, out = Path(task["checkpoint"]), Path(task["out"])
    config = EvaluationConfig.model_validate(task["config"])
    evaluation = finished(out, config)
    if evaluation is None:
        evaluation = evaluate_checkpoint(checkpoint, out, config)
    if task["tracking"] is None or (out / "logged.json").exists():
        return
    tracking = TrackingConfig.model_validate(task["tracking"])
    tracker, step = Tracker(tracking, attach=True), step_of(checkpoint)
    tracker.log_metrics(evaluation.scores.metrics(), step)
    tracker.log_artifact(out / "gallery.png", f"evaluate/{checkpoint.name}")
    tracker.log_artifact(out / "scores.json", f"evaluate/{checkpoint.name}")
    write_json(out / "logged.json", {"run_id": tracking.run_id, "step": step})


def finished(out: Path, config: EvaluationConfig) -> Evaluation | None:
    """An evaluation that is complete and was made with this configuration; another one is removed."""
    evaluation = read_evaluation(out)
    if evaluation is not None and evaluation.config != config:
        shutil.rmtree(out)
        return None
    return evaluation


class EvaluationScheduler:
    """Watches a training's checkpoints from a thread of the driver, and starts a Ray task for each that
    has no scores yet.

    Leaving the block waits for the tasks at work and starts no further ones; `finish` starts and awaits
    all that are left.
    """

    def __init__(self, config: EvaluateConfig, train: TrainConfig):
        self.config, self.train = config, train
        self.folder = train.output_dir / "evaluations"
        self.running: dict[Any, Path] = {}
        self.errors: dict[Path, str] = {}
        self._stopped = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        if self.config.beside_training:
            self._thread = Thread(target=self._watch, name="evaluations", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SEC):
            self.collect()
            self.submit(max_running=1)
        while self.running:
            self.collect(timeout_sec=POLL_SEC)

    def wanted(self) -> list[Path]:
        """Complete checkpoints to score, by step."""
        found = complete_checkpoints(self.train.output_dir / "checkpoints")
        return [path for path in found if self.config.includes(step_of(path), self.train.num_steps)]

    def tracking(self) -> dict[str, Any] | None:
        """The training's MLflow run. None where nothing is tracked."""
        path = self.train.output_dir / "mlflow_run.json"
        if self.train.tracking.uri is None or not path.exists():
            return None
        run_id = json.loads(path.read_text())["run_id"]
        return self.train.tracking.model_copy(update={"run_id": run_id}).model_dump(mode="json")

    def pending(self) -> list[Path]:
        busy = set(self.running.values()) | self.errors.keys()
        config, tracking = self.config.scoring, self.tracking()
        return [
            path
            for path in self.wanted()
            if path not in busy
            and (
                finished(self.folder / path.name, config) is None
                or (tracking is not None and not (self.folder / path.name / "logged.json").exists())
            )
        ]

    def submit(self, max_running: int) -> None:
        import ray

        remote = ray.remote(evaluate_task).options(
            num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus, max_retries=1
        )
        for checkpoint in self.pending()[: max(0, max_running - len(self.running))]:
            task = {
                "directory": os.getcwd(),
                "checkpoint": str(checkpoint),
                "out": str(self.folder / checkpoint.name),
                "config": self.config.scoring.model_dump(mode="json"),
                "tracking": self.tracking(),
            }
            self.running[remote.remote(task)] = checkpoint

    def collect(self, timeout_sec: float = 0.0) -> None:
        """Takes note of the tasks that ended; an error is kept until all have ended."""
        import ray
        from ray.exceptions import RayError

        if not self.running:
            return
        done, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=timeout_sec)
        for reference in done:
            checkpoint = self.running.pop(reference)
            try:
                ray.get(reference)
            except (RayError, ValueError, OSError) as error:
                cause = getattr(error, "cause", None) or error
                self.errors[checkpoint] = f"{type(cause).__name__}: {cause}"
                continue
            evaluation = read_evaluation(self.folder / checkpoint.name)
            assert evaluation is not None
            scores = evaluation.scores
            new = "" if scores.new_concept is None else f", new concept {scores.new_concept:.2f}"
            print(
                f"evaluate: step {step_of(checkpoint)}: overall {scores.overall:.2f}{new} "
                f"({evaluation.seconds:.0f} s)",
                flush=True,
            )

    def finish(self) -> list[tuple[Path, Evaluation]]:
        """Scores every checkpoint that has no scores yet; (folder, evaluation) of all of them, by step.

        Raises:
            StageError: an evaluation failed; the others are complete.
        """
        self.errors.clear()
        while self.pending() or self.running:
            self.submit(self.config.max_concurrent)
            self.collect(timeout_sec=POLL_SEC)
        if self.errors:
            lines = [f"{checkpoint.name}: {error}" for checkpoint, error in sorted(self.errors.items())]
            raise StageError(
                f"evaluate: {len(lines)} of {len(self.wanted())} evaluations failed: {'; '.join(lines)}"
            )
        folders = [self.folder / path.name for path in self.wanted()]
        return [(folder, one) for folder in folders if (one := read_evaluation(folder)) is not None]


def publish(source: Path, target: Path) -> None:
    """Copies an evaluation; `scores.json`, which marks it complete, comes last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("gallery.png", "scores.json"):
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def summarise(evaluation: Evaluation, step: int) -> dict[str, Any]:
    """One checkpoint's line in the summary."""
    scores = evaluation.scores
    return {
        "step": step,
        "overall": scores.overall,
        "per_task": dict(scores.per_task),
        "new_concept": scores.new_concept,
        "shuffled_overall": scores.shuffled_overall,
        "num_prompts": scores.num_prompts,
        "checkpoint": evaluation.checkpoint,
        "seconds": evaluation.seconds,
    }


def run_evaluate(config: "WorkflowConfig") -> dict[str, Any]:
    """Finishes what was not evaluated beside the training, and publishes all of it under `root`.

    Raises:
        StageError: an evaluation failed, with its error, or there is no checkpoint.
    """
    scheduler = EvaluationScheduler(config.evaluate, config.train)
    if not scheduler.wanted():
        raise StageError(f"evaluate: {config.train.output_dir}/checkpoints holds no complete checkpoint")
    started = time.perf_counter()
    with ray_session(config.ray):
        found = scheduler.finish()
    for folder, _ in found:
        publish(folder, config.root / "evaluate" / folder.name)
    with atomic_path(config.root / "gallery.png") as temporary:
        shutil.copyfile(found[-1][0] / "gallery.png", temporary)
    evaluations = [summarise(evaluation, step_of(folder)) for folder, evaluation in found]
    return {"evaluations": evaluations, "waited_sec": round(time.perf_counter() - started, 3)}
