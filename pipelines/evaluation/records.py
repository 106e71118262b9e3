"""What lies on disk about an evaluation: its scores, the attempts at it, the pins that keep its checkpoint.

train/evaluations/config.json                    what the training's evaluations are made with
train/evaluations/step_00000500/  attempts.json  every attempt, for the next driver
                                  run.json       the nested MLflow run of the attempt at work
                                  scenes/        items, outputs, answers and scores of a suite
                                  scores.json    written last: the evaluation is complete
                                  logged.json    and is in the training's MLflow run
                                  .lock          held by the driver whose attempt is at work
train/checkpoints/step_00000500/pins/evaluate    retention leaves this checkpoint for now
                                /pins/best       and the one with the highest score
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from pipelines.evaluation.config import EvaluateConfig
from repfusion.config import Strict
from repfusion.evaluation.record import Evaluation, EvaluationConfig, read_evaluation
from repfusion.files import digest_of, write_json
from repfusion.locks import take
from repfusion.runs.folder import BEST, PINS, step_of

ATTEMPTS, LOGGED = "attempts.json", "logged.json"
PIN = "evaluate"
PIN_AGAIN_SEC = 3600.0
"""A pin's date is renewed this often: retention takes one that is a day old for forgotten."""


class Attempt(Strict):
    number: int
    """Number of the attempt, from 1."""
    status: Literal["running", "finished", "failed", "cut_short"]
    """`cut_short`: stopped with its driver, which is no fault of its own and does not count."""
    started_at: float
    """Seconds since 1970."""
    ended_at: float | None = None
    error: str | None = None
    """Class and first line."""


class Record(Strict):
    """The attempts at one checkpoint."""

    config: str
    """Digest of the scoring configuration; attempts with another one are forgotten."""
    attempts: tuple[Attempt, ...] = ()
    missed: bool = False
    """Whether its checkpoint was gone before it had scores."""

    @property
    def num_failed(self) -> int:
        return sum(attempt.status == "failed" for attempt in self.attempts)

    def due_at(self, backoff_sec: float) -> float:
        """Seconds since 1970 before which there is no further attempt. A failure that is dated in the future,
        as by a clock that has been set back since, puts nothing off.
        """
        failed = [attempt for attempt in self.attempts if attempt.status == "failed"]
        ended = (failed[-1].ended_at or 0.0) if failed else 0.0
        if not failed or ended > time.time():
            return 0.0
        return ended + backoff_sec * 2 ** (len(failed) - 1)

    def begin(self) -> "Record":
        attempt = Attempt(number=len(self.attempts) + 1, status="running", started_at=time.time())
        return self.model_copy(update={"attempts": (*self.attempts, attempt), "missed": False})

    def end(self, status: Literal["finished", "failed", "cut_short"], error: str | None = None) -> "Record":
        changes = {"status": status, "ended_at": time.time(), "error": error}
        *before, last = self.attempts
        return self.model_copy(update={"attempts": (*before, last.model_copy(update=changes))})


def config_digest(config: EvaluationConfig) -> str:
    return digest_of(config.model_dump(mode="json"))


def read_record(folder: Path, config: EvaluationConfig) -> Record:
    """The attempts with this configuration; none where there is no record or it cannot be read."""
    digest = config_digest(config)
    with suppress(FileNotFoundError, ValidationError):
        record = Record.model_validate_json((folder / ATTEMPTS).read_text())
        if record.config == digest:
            return record
    return Record(config=digest)


def write_record(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ATTEMPTS, record.model_dump(mode="json"))


def finished(folder: Path, config: EvaluationConfig) -> Evaluation | None:
    """An evaluation that is complete and was made with this configuration by the present judges and rules."""
    try:
        evaluation = read_evaluation(folder)
    except ValidationError:
        return None  # of other code, or damaged: made again
    return evaluation if evaluation is not None and evaluation.is_made_with(config) else None


def hold(folder: Path) -> IO[str] | None:
    """The evaluation's lock, or None where another driver has it; it goes with the process."""
    return take(folder / ".lock")


def pin(checkpoint: Path, name: str = PIN) -> bool:
    """Keeps a checkpoint from being pruned; False where it is gone."""
    path = checkpoint / PINS / name
    try:
        # a date far in the future too: it would not be renewed for as long
        if not path.exists() or abs(time.time() - path.stat().st_mtime) > PIN_AGAIN_SEC:
            path.parent.mkdir(exist_ok=True)
            path.touch()
    except FileNotFoundError:
        return False
    return True


def unpin(checkpoint: Path, name: str = PIN) -> None:
    pins = checkpoint / PINS
    with suppress(OSError):
        (pins / name).unlink(missing_ok=True)
        os.rmdir(pins)  # refused while it holds another


def best_checkpoint(
    checkpoints: Sequence[Path], folder: Path, config: EvaluateConfig, num_steps: int
) -> Path | None:
    """The one with the highest value of `best_by`, the first of several; None where none has it."""
    scores: dict[Path, float] = {}
    for checkpoint in checkpoints:
        evaluation = finished(folder / checkpoint.name, config.scoring_at(step_of(checkpoint), num_steps))
        if evaluation is not None:
            metrics, metric = evaluation.metrics(), evaluation.best_metric(config.best_by)
            scores |= {checkpoint: metrics[metric]} if metric in metrics else {}
    return max(scores, key=lambda checkpoint: scores[checkpoint], default=None)


def pin_best(checkpoints: Sequence[Path], folder: Path, config: EvaluateConfig, num_steps: int) -> None:
    """Retention leaves the best checkpoint, until another is better."""
    best = best_checkpoint(checkpoints, folder, config, num_steps)
    if best is None:
        return
    pin(best, BEST)
    for checkpoint in checkpoints:
        if checkpoint != best:
            unpin(checkpoint, BEST)
