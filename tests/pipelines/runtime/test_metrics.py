"""What Prometheus is told: by the real pool, and of a training."""

from collections import defaultdict
from pathlib import Path

import pytest

from pipelines.runtime import metrics as metrics_module
from pipelines.runtime import pool as pool_module
from pipelines.runtime.metrics import (
    ACTOR_SECONDS,
    BYTES,
    CHECKPOINT_SECONDS,
    DROPS,
    EVALUATIONS,
    FAILED,
    FAILURES_IN_A_ROW,
    LOSS,
    MFU,
    SAMPLES,
    STEP,
    STEPS_LEFT,
    UNFINISHED,
    WAITING,
    Metric,
    StageMetrics,
    TrainingMetrics,
)
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards
from pipelines.runtime.session import StageError
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar
from pipelines.shards.tars import tar_shard
from repfusion.training.meters import Report

REPORT = Report(
    step=3,
    loss=0.5,
    other_losses={},
    grad_norm=1.0,
    lr=1e-4,
    samples_per_sec=20.0,
    step_sec=0.4,
    data_wait=0.25,
    memory_gib=1.0,
    samples_seen=24,
    epochs=1.0,
    tflops=0.1,
    mfu=0.4,
    recompilations=0,
    loss_by_noise={},
)


class Told:
    """Keeps what is told: counters summed, of gauges every value."""

    def __init__(self) -> None:
        self.sums: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = defaultdict(float)
        self.values: dict[Metric, list[float]] = defaultdict(list)

    def __call__(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        assert labels.keys() == {*metric.labels}
        self.sums[metric, frozenset(labels.items())] += value
        self.values[metric].append(value)

    def sum(self, metric: Metric, **labels: str) -> float:
        return sum(
            value for (one, found), value in self.sums.items() if one is metric and labels.items() <= found
        )


class Halver:
    """Makes shards of which it drops every other sample; one shard it cannot make."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, job: ShardJob) -> Sidecar:
        if job.name == "00002":
            raise ValueError("not this one")
        with ShardCommit(self.folder, job.name, job.fingerprint, {}) as commit:
            with tar_shard(commit) as tar:
                for index in range(4):
                    if index % 2:
                        commit.drop(f"{index:09d}", "odd")
                        continue
                    tar.write(f"{index:09d}", {"txt": b"text"})
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")


@pytest.mark.ray
def test_the_pool_tells_what_became_of_every_shard(
    pool: ActorPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told, folder = Told(), Folder(str(tmp_path))
    monkeypatch.setattr(pool_module, "to_ray", lambda: told)
    jobs = [ShardJob(f"{number:05d}", "f") for number in range(4)]
    with pytest.raises(StageError, match="1 of 4 shards failed"):
        run_shards(pool, "halve", Halver, {"folder": folder}, jobs, ActorsConfig(num_actors=2), 0, "w")
    of = {"workflow": "w", "stage": "halve"}
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
    assert told.sum(SAMPLES, **of) == 6 and told.sum(BYTES, **of) == size
    assert told.sum(DROPS, **of, reason="odd") == 6 == told.sum(DROPS)
    assert told.values[FAILED][-1] == 1
    assert told.values[UNFINISHED][0] == 4 and told.values[UNFINISHED][-1] == 0 == told.values[WAITING][-1]
    assert sorted(told.values[UNFINISHED], reverse=True) == told.values[UNFINISHED]
    spent = {state: told.sum(ACTOR_SECONDS, **of, state=state) for state in ("busy", "idle", "starting")}
    assert spent["busy"] > 0 and min(spent.values()) >= 0


def test_time_goes_to_the_state_in_which_an_actor_was(monkeypatch: pytest.MonkeyPatch):
    told, now = Told(), [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    with StageMetrics(told, "w", "s") as metrics:
        metrics.look({"busy": 2, "idle": 1}, 5, 7)
        now[0] += 0.1
        metrics.look({"idle": 3}, 0, 0)
        now[0] += 0.05
    busy, idle = (told.sum(ACTOR_SECONDS, state=state) for state in ("busy", "idle"))
    assert busy == pytest.approx(0.2) and idle == pytest.approx(0.25)
    assert told.values[WAITING] == [5, 0, 0]


def test_a_training_is_told_of_under_its_workflow_s_name(tmp_path: Path):
    told = Told()
    metrics = TrainingMetrics(told, tmp_path / "demo" / "train")
    metrics.report(REPORT)
    metrics.report(Report(**{**vars(REPORT), "step": 4, "mfu": None}))
    metrics.checkpoint(1.5)
    metrics.left(2)
    metrics.evaluation(False, 1)
    metrics.evaluation(True, 0)
    of = {"workflow": "demo", "training": "train"}
    assert told.values[STEP] == [3, 4] and told.values[MFU] == [0.4], "on a CPU there is no peak"
    assert told.values[LOSS] == [0.5, 0.5] and told.values[CHECKPOINT_SECONDS] == [1.5]
    assert told.values[STEPS_LEFT] == [2] and told.values[FAILURES_IN_A_ROW] == [1, 0]
    assert told.sum(EVALUATIONS, **of, status="failed") == 1 == told.sum(EVALUATIONS, **of, status="finished")
