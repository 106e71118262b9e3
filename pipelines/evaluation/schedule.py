"""When a training's checkpoints are evaluated: by their steps or by the clock, again after failures, after a
driver that was killed.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Self

from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.jobs import EvaluationJobs, tracking_of
from pipelines.evaluation.records import (
    LOGGED,
    Attempt,
    Record,
    finished,
    pin,
    pin_best,
    read_record,
    unpin,
    write_record,
)
from pipelines.runtime.session import StageError, brief
from repfusion.evaluation.record import Evaluation
from repfusion.files import write_json
from repfusion.runs.folder import (
    CONFIG,
    STEP_FOLDER,
    RunFolder,
    checkpoint_folder,
    complete_checkpoints,
    step_of,
)
from repfusion.train import TrainConfig

POLL_SEC = 1.0
MISSING_SEC = 60.0
"""How long a checkpoint is gone beside the training before it counts: one that is written again is away for a
moment.
"""


class EvaluationScheduler:
    """Watches a training's checkpoints from a thread of the driver, and evaluates each that is due and has
    no scores yet.

    Leaving the block waits for what is at work and starts nothing further; an exception kills it. `finish`
    starts and awaits all that is left. What a killed driver had begun is on disk: the next goes on with it.
    """

    def __init__(self, config: EvaluateConfig, train: TrainConfig, variant: str | None = None):
        self.config, self.train = config, train
        self.jobs = EvaluationJobs(config, train, variant)
        self.folder = self.jobs.folder
        self.missed: set[int] = set()
        self._done: set[str] = set()
        self._clock_at = 0.0
        self._to_unpin: list[Path] = []
        self._gone_since: dict[int, float] = {}
        self._stopped = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CONFIG, self.config.model_dump(mode="json"))
        self._thread = Thread(target=self._watch, name="evaluations", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if kind is not None:
            self.jobs.cancel()
        self.jobs.lift()
        while self.jobs.running and self.jobs.is_alive():
            self.jobs.poll(POLL_SEC)
        self.jobs.cancel()
        self.jobs.collect_reports(10 * POLL_SEC)

    def _watch(self) -> None:
        from ray.exceptions import RayError

        said = ""
        while not self._stopped.wait(POLL_SEC):
            try:
                self._look()
            except (OSError, RayError, StageError) as error:
                # a full disk or a lost node; training may well go on, and so do we when it passes
                if said != (said := brief(error)):
                    print(f"evaluate: {said}", flush=True)

    def _look(self) -> None:
        """Once every POLL_SEC beside the training."""
        self.jobs.poll(0.0)
        self.jobs.collect_reports()
        left = [path for path in self.pending() if self._has_attempts_left(path)]
        for checkpoint in left:
            pin(checkpoint)
        self._unpin_done()
        self._note_missed(MISSING_SEC)
        if not self.config.beside_training or self.jobs.running or not self.jobs.has_room():
            return
        for checkpoint in [path for path in left if self._is_due(path)] or self._clock():
            if pin(checkpoint) and self.jobs.start(checkpoint, is_idle=True):
                return

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, by step."""
        return complete_checkpoints(RunFolder(self.train.output_dir).checkpoints)

    def is_wanted(self, checkpoint: Path, newest: Path) -> bool:
        """Whether the schedule takes a checkpoint; by the clock, what has begun and, at last, the newest."""
        if self.config.every_minutes is None:
            return self.config.includes(step_of(checkpoint), self.train.num_steps)
        return bool(self._record(checkpoint).attempts) or (self._stopped.is_set() and checkpoint == newest)

    def wanted(self) -> list[Path]:
        """Complete checkpoints that the schedule is for, whether they have scores or not, by step."""
        found = self.checkpoints()
        return [path for path in found if self.is_wanted(path, found[-1])]

    def pending(self) -> list[Path]:
        """Wanted checkpoints that have no scores, or whose scores are not in MLflow."""
        found = self.checkpoints()
        left = [path for path in found if path.name not in self._done]
        return [path for path in left if self.is_wanted(path, found[-1]) and not self.is_done(path)]

    def is_done(self, checkpoint: Path) -> bool:
        """Whether the scores of a checkpoint are there, and in MLflow where runs are tracked."""
        if checkpoint.name in self._done:
            return True
        out = self.jobs.place(checkpoint)
        if checkpoint.name in self.jobs.running or finished(out, self.jobs.scoring(checkpoint)) is None:
            return False
        if self.jobs.variant is None and tracking_of(self.train) and not (out / LOGGED).exists():
            return False
        self._done.add(checkpoint.name)
        self._to_unpin.append(checkpoint)
        return True

    def _unpin_done(self) -> None:
        """The best one so far keeps a pin."""
        if not self._to_unpin:
            return
        if self.jobs.variant is None:
            pin_best(self.checkpoints(), self.folder, self.config, self.train.num_steps)
        while self._to_unpin:
            unpin(self._to_unpin.pop())

    def _record(self, checkpoint: Path) -> Record:
        return read_record(self.jobs.place(checkpoint), self.jobs.scoring(checkpoint))

    def _has_attempts_left(self, checkpoint: Path) -> bool:
        if self._record(checkpoint).num_failed < self.config.max_attempts:
            return True
        unpin(checkpoint)
        return False

    def _is_due(self, checkpoint: Path) -> bool:
        return time.time() >= self._record(checkpoint).due_at(self.config.backoff_sec)

    def _clock(self) -> list[Path]:
        """The newest checkpoint without scores, where its time has come."""
        if self.config.every_minutes is None:
            return []
        if time.monotonic() < self._clock_at:
            return []
        now = time.time()
        begun = [one.started_at for folder in self._folders() for one in self._attempts(folder)[:1]]
        # what is dated in the future says nothing of the pace
        past_sec = now - max((began for began in begun if began <= now), default=0.0)
        left_sec = 60 * self.config.every_minutes - past_sec
        if left_sec > 0:
            self._clock_at = time.monotonic() + left_sec
            return []
        left = [path for path in self.checkpoints() if path.name not in self._done]
        return [path for path in left if not self._record(path).attempts and not self.is_done(path)][-1:]

    def _attempts(self, folder: Path) -> tuple[Attempt, ...]:
        return read_record(folder, self.jobs.scoring(folder)).attempts

    def _folders(self) -> list[Path]:
        """Folders of all evaluations, by step; those of checkpoints that are gone as well."""
        if self.jobs.variant is not None:
            return []
        found = [path for path in self.folder.glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def _steps_written(self, newest: int) -> set[int]:
        """Steps at which the training has written a checkpoint that is to be evaluated."""
        if self.config.every_minutes is not None:
            return set()
        every = self.train.checkpoint_every_steps
        steps = {*range(every, newest + 1, every), *([0] if self.train.init_from is not None else [])}
        return {step for step in steps if self.config.includes(step, self.train.num_steps)}

    def _note_missed(self, missing_sec: float) -> None:
        """Checkpoints that were to be evaluated and are gone: said, recorded and tagged in MLflow, once."""
        found = {step_of(path) for path in self.checkpoints()}
        if not found or self.jobs.variant is not None:
            return
        self.missed -= found
        folders = [folder for folder in self._folders() if folder.name not in self._done]
        begun = {step_of(folder) for folder in folders if self._attempts(folder)}
        now, root = time.monotonic(), RunFolder(self.train.output_dir).checkpoints
        gone = {
            step
            for step in (self._steps_written(max(found)) | begun) - found - self.missed
            if not self.is_done(checkpoint_folder(root, step))
        }
        self._gone_since = {step: self._gone_since.get(step, now) for step in gone}
        for step in sorted(step for step, since in self._gone_since.items() if now - since >= missing_sec):
            checkpoint = checkpoint_folder(root, step)
            record = self._record(checkpoint)
            self.missed.add(step)
            if checkpoint.name in self.jobs.running or record.missed:
                continue
            write_record(self.jobs.place(checkpoint), record.model_copy(update={"missed": True}))
            self.jobs.report_missed(sorted(self.missed))
            print(f"evaluate: step {step}: missed, its checkpoint was gone before it had scores", flush=True)

    def run(self, checkpoints: Sequence[Path], is_idle: bool = False) -> None:
        """Evaluates these and waits; each that failed too often before is tried once more.

        Raises:
            StageError: an evaluation failed; the others are complete.
        """
        allowed = {
            path: max(self.config.max_attempts, self._record(path).num_failed + 1) for path in checkpoints
        }
        self.jobs.errors.clear()
        elsewhere: set[Path] = set()
        try:
            while left := [path for path in checkpoints if self._is_left(path, allowed[path])]:
                for checkpoint in left:
                    if len(self.jobs.running) >= self.config.max_concurrent:
                        break
                    if checkpoint.name in self.jobs.running or not self._is_due(checkpoint):
                        continue
                    pin(checkpoint)
                    if not self.jobs.start(checkpoint, is_idle) and checkpoint not in elsewhere:
                        elsewhere.add(checkpoint)
                        print(f"evaluate: {checkpoint.name}: another process is at it; waiting", flush=True)
                self.jobs.poll(POLL_SEC)
                self.jobs.check_room()
        finally:
            self.jobs.cancel()
            self._unpin_done()
            self.jobs.collect_reports(60 * POLL_SEC)
        if failed := self.jobs.errors:
            lines = [f"{name}: {error}" for name, error in sorted(failed.items())]
            raise StageError(
                f"evaluate: {len(lines)} of {len(checkpoints)} evaluations failed: {'; '.join(lines)}"
            )

    def _is_left(self, checkpoint: Path, max_attempts: int) -> bool:
        if checkpoint.name in self.jobs.running:
            return True
        if self.is_done(checkpoint):
            return False
        if not checkpoint.exists():
            self.jobs.errors.pop(checkpoint.name, None)
            return False
        if self._record(checkpoint).num_failed < max_attempts:
            return True
        unpin(checkpoint)
        return False

    def finish(self) -> list[tuple[Path, Evaluation]]:
        """Scores every wanted checkpoint without scores; (folder, evaluation) of all of them, by step.

        Raises:
            StageError: an evaluation failed; the others are complete.
        """
        self._stopped.set()
        wanted = self.wanted()
        for checkpoint in self.pending():
            pin(checkpoint)
        try:
            self.run(wanted)
        finally:
            self._note_missed(0.0)
            self.jobs.collect_reports(60 * POLL_SEC)
        found = [(folder, finished(folder, self.jobs.scoring(folder))) for folder in self._folders()]
        chosen = {path.name for path in wanted}
        return [
            (folder, one)
            for folder, one in found
            if one is not None and (folder.name in chosen or self._is_chosen(step_of(folder)))
        ]

    def _is_chosen(self, step: int) -> bool:
        """Whether the scores of a checkpoint that is gone belong to the schedule."""
        return self.config.every_minutes is not None or self.config.includes(step, self.train.num_steps)
