"""Evaluations at work, seen from the driver: each an actor of Ray, started, watched, killed and recorded.

Actors and not Ray's Job API: that needs the dashboard's server, so `ray[default]` and an open port even on a
laptop; an actor too is a process of its own with resources of its own, and it dies with its driver.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.process import RUN_FILE, Evaluator, report_failure, report_missed
from pipelines.evaluation.records import Record, finished, hold, read_record, write_record
from pipelines.runtime.metrics import TrainingMetrics, to_ray
from pipelines.runtime.session import PATIENCE_SEC, StageError, brief, check_ray_lives
from pipelines.runtime.tasks import AtWork
from repfusion.display.redaction import redact_text
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.shown import in_brief
from repfusion.runs.folder import RunFolder, step_of
from repfusion.train import TrainConfig

NO_ROOM_SEC = 600.0
"""How long evaluations wait for resources that nothing of ours uses, before they give up."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ASK_SEC = 0.5
"""Between two questions to a process."""


@dataclass
class _Job:
    checkpoint: Path
    task: dict[str, Any]
    record: Record
    lock: IO[str]
    actor: Any
    heard: Any
    """Reference to the process's next answer about how long it was held back."""
    helpers: dict[Any, Any] = field(default_factory=dict)
    """Actors that draw and judge beside it, by the references to their ends."""
    asked: float = field(default_factory=time.monotonic)
    up_since: float | None = None
    waited_sec: float = 0.0

    @property
    def out(self) -> Path:
        return Path(self.task["out"])

    @property
    def actors(self) -> list[Any]:
        """The processes at work."""
        return [self.actor, *(one for one in self.helpers.values() if one is not None)]


def tracking_of(train: TrainConfig) -> dict[str, Any] | None:
    """The training's MLflow run. None where nothing is tracked."""
    path = RunFolder(train.output_dir).tracked
    if train.tracking.uri is None or not path.exists():
        return None
    run_id = json.loads(path.read_text())["run_id"]
    # the address itself, from this process's memory: the file beside it has none that anybody logs in to
    return train.tracking.model_copy(update={"run_id": run_id}).model_dump(mode="json")


class EvaluationJobs:
    """The evaluations that this driver has at work. What they find lies on disk; `errors` holds what failed
    last.

    `variant` names results that stand beside the scheduled ones: made with another configuration, they are in
    the nested MLflow run alone.
    """

    def __init__(self, config: EvaluateConfig, train: TrainConfig, variant: str | None = None):
        self.config, self.train, self.variant = config, train, variant
        self.folder = RunFolder(train.output_dir).evaluations
        self.errors: dict[str, str] = {}
        self.running: dict[str, _Job] = {}
        self._at_work: AtWork[_Job] = AtWork()
        self._reports: list[Any] = []
        self._no_room_since: float | None = None
        self._metrics = TrainingMetrics(to_ray(), train.output_dir)
        self._failed_in_a_row = 0

    def place(self, checkpoint: Path) -> Path:
        """Where the evaluation of a checkpoint lies."""
        name = checkpoint.name if self.variant is None else f"{checkpoint.name}.{self.variant}"
        return self.folder / name

    def scoring(self, checkpoint: Path) -> EvaluationConfig:
        """What decides the scores of a checkpoint; a variant has all suites."""
        if self.variant is not None:
            return self.config.scoring
        return self.config.scoring_at(step_of(checkpoint), self.train.num_steps)

    def has_room(self) -> bool:
        """Whether the cluster has the resources of one more evaluation free: one that waits in Ray's queue
        could take what ranks that are being restarted need.
        """
        import ray

        if not (needs := self.config.resources):
            return True
        free = ray.available_resources()
        return all(free.get(name, 0) >= amount for name, amount in needs.items())

    def start(self, checkpoint: Path, is_idle: bool) -> bool:
        """False where another driver is at this evaluation, or has just completed it."""

        out = self.place(checkpoint)
        if (lock := hold(out)) is None:
            return False
        record = read_record(out, self.scoring(checkpoint))
        if record.attempts and record.attempts[-1].status == "running":
            # its driver is gone, or the lock would be held
            record = self._cut_short(checkpoint, record)
        (out / RUN_FILE).unlink(missing_ok=True)
        record = record.begin()
        write_record(out, record)
        task = self.task(checkpoint, record.attempts[-1].number, is_idle)
        actor = self._process(task)
        result, heard = actor.evaluate.remote(), actor.waited_sec.remote()
        job = self.running[checkpoint.name] = _Job(checkpoint, task, record, lock, actor, heard)
        self._at_work.add(job, result)
        return True

    def _process(self, task: dict[str, Any]) -> Any:
        """An actor for a task."""
        import ray

        options = {
            "num_cpus": self.config.num_cpus,
            "num_gpus": self.config.num_gpus,
            "max_restarts": 0,
            "max_concurrency": 3,
        }
        if self.config.memory_mib is not None:
            options["memory"] = self.config.memory_mib << 20
        return ray.remote(**options)(Evaluator).remote(task)

    def _look_for_help(self, job: _Job) -> None:
        """Starts a further process where there may be one and there is room; lets go of one that is done."""
        import ray
        from ray.exceptions import RayError

        running = [end for end, actor in job.helpers.items() if actor is not None]
        for end in ray.wait(running, num_returns=len(running), timeout=0)[0] if running else []:
            try:
                said = f"another process drew and judged {ray.get(end)} parts"
            except RayError as error:
                said = f"another process that drew and judged ended: {brief(error)}"
            print(f"evaluate: step {step_of(job.checkpoint)}: {said}", flush=True)
            ray.kill(job.helpers[end])
            job.helpers[end] = None
        # once the first is up, or it might wait for the room of its own helpers
        may_start = job.up_since is not None and len(job.helpers) < self.config.num_processes - 1
        if may_start and self.has_room():
            actor = self._process(job.task)
            job.helpers[actor.help.remote()] = actor

    def task(self, checkpoint: Path, attempt: int, is_idle: bool) -> dict[str, Any]:
        """What an attempt is given: plain values, for a process of its own."""
        return {
            "directory": os.getcwd(),
            "checkpoint": str(checkpoint),
            "out": str(self.place(checkpoint)),
            "config": self.scoring(checkpoint).model_dump(mode="json"),
            "best_by": self.config.best_by,
            "tracking": tracking_of(self.train),
            "attempt": attempt,
            "is_idle": is_idle,
            "is_scheduled": self.variant is None,
            "num_threads": max(1, int(self.config.num_cpus)),
        }

    def poll(self, timeout_sec: float) -> None:
        """Takes note of those that ended within the time, and kills those that take too long."""
        if not self.running:
            time.sleep(timeout_sec)
            return
        for job, outcome in self._at_work.ended(timeout_sec):
            self._collect(job, outcome)
        for job in list(self.running.values()):
            self._look_for_help(job)
            if self._is_overdue(job):
                message = f"took longer than deadline_sec {self.config.deadline_sec:g}"
                self._end(job, "failed", message, f"stopped by the driver: {message}")

    def _collect(self, job: _Job, outcome: Any) -> None:
        from ray.exceptions import RayError, RayTaskError

        match outcome:
            case RayTaskError():
                self._end(job, "failed", brief(outcome), redact_text(COLOUR.sub("", str(outcome))))
            case RayError():
                self._end(job, "failed", f"its process died: {brief(outcome)}", redact_text(str(outcome)))
            case _:
                self._end(job, "finished")

    def _is_overdue(self, job: _Job) -> bool:
        """Whether an attempt takes too long. Time counts from when its process answers, and not while others
        use its processor.
        """
        import ray
        from ray.exceptions import RayError

        now = time.monotonic()
        if now - job.asked >= ASK_SEC and ray.wait([job.heard], timeout=0)[0]:
            try:
                job.waited_sec = ray.get(job.heard)
            except RayError:
                return False  # dead: its result says so
            job.up_since = job.up_since or now
            job.heard, job.asked = job.actor.waited_sec.remote(), now
        if job.up_since is None or self.config.deadline_sec is None:
            return False
        return now - job.up_since - job.waited_sec > self.config.deadline_sec

    def _end(
        self,
        job: _Job,
        status: Literal["finished", "failed"],
        error: str = "",
        traceback: str = "",
    ) -> None:
        self._kill(job)
        del self.running[job.checkpoint.name]
        write_record(job.out, job.record.end(status, error or None))
        job.lock.close()
        self._failed_in_a_row = 0 if status == "finished" else self._failed_in_a_row + 1
        self._metrics.evaluation(status == "finished", self._failed_in_a_row)
        if status == "finished":
            self.errors.pop(job.checkpoint.name, None)
            self._say(job)
            return
        self.errors[job.checkpoint.name] = error
        number = job.record.attempts[-1].number
        print(f"evaluate: step {step_of(job.checkpoint)}: attempt {number} failed: {error}", flush=True)
        self._report(job.task, "FAILED", error, traceback)

    def _say(self, job: _Job) -> None:
        evaluation = finished(job.out, self.scoring(job.checkpoint))
        if evaluation is None:
            return
        step, seconds = step_of(job.checkpoint), evaluation.seconds
        print(f"evaluate: step {step}: {in_brief(evaluation)} ({seconds:.0f} s)", flush=True)

    def _cut_short(self, checkpoint: Path, record: Record) -> Record:
        """Records that the last attempt went with its driver."""
        task = self.task(checkpoint, record.attempts[-1].number, is_idle=True)
        self._report(task, "KILLED", "its driver ended first", "")
        record = record.end("cut_short", "its driver ended first")
        write_record(self.place(checkpoint), record)
        return record

    def _report(self, task: dict[str, Any], status: str, error: str, traceback: str) -> None:
        import ray

        if task["tracking"] is None:
            return
        path = Path(task["out"]) / RUN_FILE
        run = json.loads(path.read_text()) if path.exists() else {}
        run_id = run["run_id"] if run.get("attempt") == task["attempt"] else None
        remote = ray.remote(num_cpus=0, max_retries=1)(report_failure)
        self._reports.append(remote.remote(task, run_id, status, error, traceback))

    def report_missed(self, steps: list[int]) -> None:
        import ray

        if (tracking := tracking_of(self.train)) is not None:
            remote = ray.remote(num_cpus=0, max_retries=1)(report_missed)
            self._reports.append(remote.remote(os.getcwd(), tracking, steps))

    def collect_reports(self, timeout_sec: float = 0.0) -> None:
        """Failures that could not be told to MLflow are said here."""
        import ray
        from ray.exceptions import RayError

        if not self._reports:
            return
        done, self._reports = ray.wait(self._reports, num_returns=len(self._reports), timeout=timeout_sec)
        for reference in done:
            try:
                ray.get(reference)
            except RayError as error:
                print(f"evaluate: MLflow was not told of a failure: {brief(error)}", flush=True)

    def check_room(self) -> None:
        """Raises StageError where no process comes up for long, or Ray is gone."""
        now = time.monotonic()
        if not self.running or any(job.up_since is not None for job in self.running.values()):
            self._no_room_since = None
            return
        self._no_room_since = self._no_room_since or now
        if now - self._no_room_since > PATIENCE_SEC:
            check_ray_lives()
        if now - self._no_room_since > NO_ROOM_SEC:
            needs = ", ".join(f"{name} {amount:g}" for name, amount in self.config.resources.items())
            raise StageError(
                f"evaluate: no process started within {NO_ROOM_SEC:g} s; each reserves {needs or 'nothing'}: "
                "is the cluster busy with other jobs, or too small?"
            )

    def is_alive(self) -> bool:
        """Whether something can still come of what runs."""
        try:
            self.check_room()
        except StageError as error:
            print(error, flush=True)
            return False
        return True

    def lift(self) -> None:
        """The training is over: nothing is to be left idle for it."""
        for job in self.running.values():
            for actor in job.actors:
                actor.lift.remote()

    def cancel(self) -> None:
        """Kills what is at work, as when the driver itself is killed: the next one finds it cut short."""
        for job in self.running.values():
            self._kill(job)
            job.lock.close()
        self.running.clear()

    def _kill(self, job: _Job) -> None:
        """Ends an evaluation's processes."""
        import ray

        for actor in job.actors:
            ray.kill(actor)
        self._at_work.forget(job)
