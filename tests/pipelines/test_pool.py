"""The actor pool on a real local Ray: a poisoned shard, a dying actor, a worker that cannot start."""

import os
import signal
from pathlib import Path

import pytest

from pipelines.pool import ActorPool, ActorsConfig, ShardJob, StageError, run_shards
from pipelines.store import ShardCommit, Sidecar, read_sidecar

pytestmark = pytest.mark.ray


class Worker:
    """Writes a file per shard; `moods` says which shards go wrong and how."""

    def __init__(self, folder: Path, moods: dict[str, str]):
        if "start" in moods:
            raise ValueError("no such model folder")
        self.folder, self.moods = folder, moods

    def __call__(self, job: ShardJob) -> Sidecar:
        with (self.folder / "calls").open("a") as calls:
            calls.write(job.name + "\n")
        mood = self.moods.get(job.name)
        if mood == "poisoned":
            raise ValueError(f"shard {job.name}: bad bytes")
        marker = self.folder / f"died-{job.name}"
        if mood == "always dies" or (mood == "dies once" and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs) as commit:
            (commit.staging / f"{job.name}.parquet").write_text(job.name)
            commit.samples = 1
            return commit.commit(f"{job.name}.parquet")


def run(pool: ActorPool, folder: Path, moods: dict[str, str], num_actors: int = 2) -> list[Sidecar]:
    jobs = [ShardJob(f"{index:05d}", "f") for index in range(5)]
    return run_shards(
        pool, "test", Worker, {"folder": folder, "moods": moods}, jobs, ActorsConfig(num_actors=num_actors)
    )


def test_results_come_in_the_order_of_the_jobs_and_actors_are_kept(pool, tmp_path):
    assert [sidecar.name for sidecar in run(pool, tmp_path, {})] == [f"{index:05d}" for index in range(5)]
    kept = idle_actors(pool)
    run(pool, tmp_path, {})
    assert idle_actors(pool) == kept


def idle_actors(pool: ActorPool) -> set[str]:
    return {str(actor) for actors in pool._idle.values() for actor in actors}


def test_a_poisoned_shard_fails_the_stage_after_the_others(pool, tmp_path):
    with pytest.raises(StageError, match="1 of 5 shards failed") as failure:
        run(pool, tmp_path, {"00001": "poisoned"})
    assert "00001  ValueError: shard 00001: bad bytes" in str(failure.value)
    assert [read_sidecar(tmp_path, f"{index:05d}") is not None for index in range(5)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_an_actor_that_dies_loses_no_shard(pool, tmp_path):
    sidecars = run(pool, tmp_path, {"00002": "dies once"})
    assert len(sidecars) == 5
    calls = (tmp_path / "calls").read_text().split()
    assert sorted(calls) == ["00000", "00001", "00002", "00002", "00003", "00004"]


def test_a_shard_that_kills_every_actor_fails_alone(pool, tmp_path):
    with pytest.raises(StageError, match="00003  its actor died 3 times"):
        run(pool, tmp_path, {"00003": "always dies"}, num_actors=1)
    assert read_sidecar(tmp_path, "00004") is not None


def test_a_worker_that_cannot_start_says_why_at_once(pool, tmp_path):
    with pytest.raises(StageError, match="could not start: ValueError: no such model folder"):
        run(pool, tmp_path, {"start": "fails"})
    assert not (tmp_path / "calls").exists()
