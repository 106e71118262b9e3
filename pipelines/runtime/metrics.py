"""What a workflow tells Prometheus while it runs, by the exporter that Ray has on each node: names, and who
says what when. cluster/observability/ holds the dashboard and the alerts that read it.

The driver tells of stages and evaluations, rank 0 of its training. What is left of a training is told by the
driver too, so that ranks that hang or are gone are seen.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pipelines.shards.store import Sidecar

if TYPE_CHECKING:
    from repfusion.training.meters import Report

STAGE = ("workflow", "stage")
TRAINING = ("workflow", "training")


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called in the code, and which labels its series have."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    text: str
    """What it counts, in which unit."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


SAMPLES = Metric("repfusion_stage_samples", "counter", STAGE, "samples of the shards that are complete")
BYTES = Metric("repfusion_stage_bytes", "counter", STAGE, "bytes of the shards that are complete")
DROPS = Metric("repfusion_stage_drops", "counter", (*STAGE, "reason"), "samples that were left out")
ACTOR_SECONDS = Metric(
    "repfusion_stage_actor_seconds",
    "counter",
    (*STAGE, "state"),
    "seconds of all actors together, busy, idle or starting",
)
WAITING = Metric("repfusion_stage_waiting_shards", "gauge", STAGE, "shards that no actor has yet")
UNFINISHED = Metric(
    "repfusion_stage_unfinished_shards", "gauge", STAGE, "shards left; 0 when the stage is over"
)
FAILED = Metric("repfusion_stage_failed_shards", "gauge", STAGE, "shards given up in this run")
STEP = Metric("repfusion_train_step", "gauge", TRAINING, "steps done, as rank 0 last reported")
STEPS_LEFT = Metric(
    "repfusion_train_steps_left", "gauge", TRAINING, "steps left, as the driver sees it; 0 when it is over"
)
LOSS = Metric("repfusion_train_loss", "gauge", TRAINING, "mean loss of the last report")
STEP_SECONDS = Metric("repfusion_train_step_seconds", "gauge", TRAINING, "seconds a step")
TRAIN_RATE = Metric("repfusion_train_samples_per_second", "gauge", TRAINING, "samples a second, all ranks")
DATA_WAIT = Metric(
    "repfusion_train_data_wait_share",
    "gauge",
    TRAINING,
    "share of the time that the slowest rank waited for data",
)
MFU = Metric("repfusion_train_mfu", "gauge", TRAINING, "share of the GPU's bfloat16 peak; none on a CPU")
CHECKPOINT_SECONDS = Metric(
    "repfusion_train_checkpoint_seconds", "gauge", TRAINING, "seconds that the last checkpoint took"
)
EVALUATIONS = Metric(
    "repfusion_evaluations", "counter", (*TRAINING, "status"), "attempts to evaluate that finished or failed"
)
FAILURES_IN_A_ROW = Metric(
    "repfusion_evaluation_failures_in_a_row", "gauge", TRAINING, "failed attempts since the last success"
)
METRICS = (
    *(SAMPLES, BYTES, DROPS, ACTOR_SECONDS, WAITING, UNFINISHED, FAILED),
    *(STEP, STEPS_LEFT, LOSS, STEP_SECONDS, TRAIN_RATE, DATA_WAIT, MFU, CHECKPOINT_SECONDS),
    *(EVALUATIONS, FAILURES_IN_A_ROW),
)

Sink = Callable[[Metric, float, dict[str, str]], None]
"""Takes a value: what a counter goes up by, or what a gauge is now."""


def to_ray() -> Sink:
    """Tells Ray's core, which sends it to the node's exporter every ten seconds. Within a session."""
    from ray.util import metrics

    made: dict[str, Any] = {}

    def record(metric: Metric, value: float, labels: dict[str, str]) -> None:
        if metric.name not in made:
            kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            made[metric.name] = kind(metric.name, metric.text, metric.labels)
        if metric.kind == "gauge":
            made[metric.name].set(value, labels)
        elif value > 0:
            made[metric.name].inc(value, labels)

    return record


class StageMetrics:
    """A stage whose shards run through a pool, for the length of a block."""

    def __init__(self, sink: Sink, workflow: str, stage: str):
        self.sink, self.labels = sink, {"workflow": workflow, "stage": stage}
        self._actors: Mapping[str, int] = {}
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.look({}, waiting=0, unfinished=0)

    def completed(self, made: Any) -> None:
        """A shard is complete; `made` is what its worker returned, its sidecar where it commits one."""
        if not isinstance(made, Sidecar):
            return
        size = made.bytes + sum(file.bytes for file in made.files.values())
        self.sink(SAMPLES, made.samples, self.labels)
        self.sink(BYTES, size, self.labels)
        for reason, number in made.drops.items():
            self.sink(DROPS, number, {**self.labels, "reason": reason})

    def failed(self, number: int) -> None:
        """So many shards were given up so far."""
        self.sink(FAILED, number, self.labels)

    def look(self, actors: Mapping[str, int], waiting: int, unfinished: int) -> None:
        """The pool as it is from now on; until now it was as it was looked at last.

        Args:
            actors: how many are `busy`, `idle` and `starting`.
            waiting: shards that no actor has.
            unfinished: those and the ones at work.
        """
        now = time.monotonic()
        for state, number in self._actors.items():
            self.sink(ACTOR_SECONDS, number * (now - self._looked), {**self.labels, "state": state})
        self._actors, self._looked = Counter(actors), now
        self.sink(WAITING, waiting, self.labels)
        self.sink(UNFINISHED, unfinished, self.labels)


class TrainingMetrics:
    """A training, whose output folder lies in the workflow's root and has its name."""

    def __init__(self, sink: Sink, output_dir: Path):
        folder = output_dir.resolve()
        self.sink, self.labels = sink, {"workflow": folder.parent.name, "training": folder.name}

    def report(self, report: "Report") -> None:
        """What rank 0 says in a log line."""
        values = {
            STEP: report.step,
            LOSS: report.loss,
            STEP_SECONDS: report.step_sec,
            TRAIN_RATE: report.samples_per_sec,
            DATA_WAIT: report.data_wait,
            MFU: report.mfu,
        }
        for metric, value in values.items():
            if value is not None:
                self.sink(metric, float(value), self.labels)

    def checkpoint(self, seconds: float) -> None:
        """A checkpoint is complete."""
        self.sink(CHECKPOINT_SECONDS, seconds, self.labels)

    def left(self, steps: int) -> None:
        """What the driver sees of it."""
        self.sink(STEPS_LEFT, steps, self.labels)

    def evaluation(self, is_finished: bool, failures_in_a_row: int) -> None:
        """An attempt to evaluate a checkpoint ended."""
        labels = {**self.labels, "status": "finished" if is_finished else "failed"}
        self.sink(EVALUATIONS, 1, labels)
        self.sink(FAILURES_IN_A_ROW, failures_in_a_row, self.labels)
