"""The actor pool on a real local Ray: shards that fail, hang or kill, actors that die, overlapping shards."""

import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipelines.runtime import pool as pool_module
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards, shards_in_flight
from pipelines.runtime.session import StageError
from pipelines.runtime.transient import is_transient
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, read_sidecar

pytestmark = pytest.mark.ray
NAMES = [f"{index:05d}" for index in range(5)]


class StoreIsBusy(RuntimeError):
    """What some object store's client raises."""


class Worker:
    """Writes a file per shard; `moods` says which shards go wrong and how.

    Every call appends a line `NAME START` to the file `calls`.
    """

    def __init__(self, folder: Folder, moods: dict[str, str]):
        if "start" in moods:
            raise ValueError("no such model folder")
        if "start once" in moods and self._first(folder, "start"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.folder, self.moods = folder, moods

    @staticmethod
    def _first(folder: Folder, name: str) -> bool:
        """Whether this is the first attempt at something."""
        try:
            (folder.path / f"tried-{name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def __call__(self, job: ShardJob) -> Sidecar:
        with (self.folder.path / "calls").open("a") as calls:
            calls.write(f"{job.name} {time.time()}\n")
        with (self.folder.path / "careful").open("a") as careful:
            careful.write(f"{job.name} {job.careful_sec}\n")
        self._misbehave(job.name)
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs) as commit:
            (commit.staging / f"{job.name}.parquet").write_text(job.name)
            commit.samples = 1
            return commit.commit(f"{job.name}.parquet")

    def _misbehave(self, name: str) -> None:
        match self.moods.get(name, "").split():
            case ["poisoned"]:
                raise ValueError(f"shard {name}: bad bytes")
            case ["dies", when] if when == "always" or self._first(self.folder, name):
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hangs", when] if when == "always" or self._first(self.folder, name):
                time.sleep(60)
            case ["busy", error, times]:
                if len(calls_of(self.folder.path, name)) <= int(times):
                    raise {"TimeoutError": TimeoutError, "StoreIsBusy": StoreIsBusy}[error]("try again")
            case ["sleeps", seconds]:
                time.sleep(float(seconds))


class PairWorker(Worker):
    """Two shards at a time."""

    concurrency: ClassVar[int] = 2


class Meeting:
    """Each shard waits until another is there too, at most some seconds; returns whether one was."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, job: ShardJob) -> bool:
        here = self.folder.path / f"here-{job.name}"
        here.touch()
        try:
            deadline = time.monotonic() + job.arguments["patience_sec"]
            while time.monotonic() < deadline:
                if len(list(self.folder.path.glob("here-*"))) > 1:
                    time.sleep(0.5)  # long enough for the other one to look
                    return True
                time.sleep(0.02)
            return False
        finally:
            here.unlink()


class PairMeeting(Meeting):
    concurrency: ClassVar[int] = 2


def run(
    pool: ActorPool, folder: Path, moods: dict[str, str], worker: type = Worker, **actors: Any
) -> dict[str, Sidecar]:
    jobs = [ShardJob(name, "f") for name in NAMES]
    arguments = {"folder": Folder(str(folder)), "moods": moods}
    settings = ActorsConfig(**{"num_actors": 2, "backoff_sec": 0.1, **actors})
    return run_shards(pool, "test", worker, arguments, jobs, settings)


def calls_of(folder: Path, name: str | None = None) -> list[float]:
    """When a shard, or any, was tried, in order."""
    lines = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return sorted(float(when) for called, when in lines if name in (None, called))


def is_complete(folder: Path, name: str) -> bool:
    return read_sidecar(Folder(str(folder)), name) is not None


def test_every_shard_has_its_result_and_actors_are_kept(pool, tmp_path):
    made = run(pool, tmp_path, {})
    assert {name: sidecar.name for name, sidecar in made.items()} == {name: name for name in NAMES}
    # an actor that was still starting when the last shard was done is not kept
    kept = idle_actors(pool)
    run(pool, tmp_path, {})
    assert kept and kept <= idle_actors(pool)


def idle_actors(pool: ActorPool) -> set[str]:
    return {str(actor) for actors in pool._idle.values() for actor in actors}


def test_a_poisoned_shard_fails_the_stage_after_the_others(pool, tmp_path):
    with pytest.raises(StageError, match="1 of 5 shards failed; the others are complete") as failure:
        run(pool, tmp_path, {"00001": "poisoned"})
    assert "00001  ValueError: shard 00001: bad bytes" in str(failure.value)
    assert "attempt" not in str(failure.value)
    assert [is_complete(tmp_path, name) for name in NAMES] == [True, False, True, True, True]
    assert len(calls_of(tmp_path)) == 5


def test_an_actor_that_dies_loses_no_shard(pool, tmp_path):
    assert set(run(pool, tmp_path, {"00002": "dies once"})) == set(NAMES)
    assert [len(calls_of(tmp_path, name)) for name in NAMES] == [1, 1, 2, 1, 1]


def test_a_shard_that_kills_every_actor_fails_alone_after_max_attempts(pool, tmp_path):
    with pytest.raises(StageError, match=r"00003  its actor died: .* \(attempt 2\)") as failure:
        run(pool, tmp_path, {"00003": "dies always"}, num_actors=1, max_attempts=2)
    assert "1 of 5 shards failed" in str(failure.value)
    assert len(calls_of(tmp_path, "00003")) == 2
    assert is_complete(tmp_path, "00004")


@pytest.mark.parametrize("max_attempts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_neighbour_of_a_killed_shard_is_not_blamed(pool, tmp_path, max_attempts):
    moods = {"00000": "dies always", "00001": "sleeps 0.5"}
    with pytest.raises(StageError, match="1 of 5 shards failed") as failure:
        run(pool, tmp_path, moods, PairWorker, num_actors=1, max_attempts=max_attempts)
    assert "00000  its actor died" in str(failure.value)
    assert [is_complete(tmp_path, name) for name in NAMES] == [False, True, True, True, True]
    # with its neighbour, then alone as often as it may be tried: at most one death takes another shard along
    assert len(calls_of(tmp_path, "00000")) <= max_attempts + 1
    assert len(calls_of(tmp_path, "00001")) <= 2


def test_a_transient_error_is_tried_again_after_growing_waits(pool, tmp_path):
    made = run(pool, tmp_path, {"00001": "busy TimeoutError 2"}, backoff_sec=0.4)
    assert set(made) == set(NAMES)
    first, second, third = calls_of(tmp_path, "00001")
    assert second - first >= 0.4 and third - second >= 0.8
    # the others do not wait for it
    assert max(max(calls_of(tmp_path, name)) for name in NAMES if name != "00001") < third


def test_a_transient_error_that_stays_is_reported_with_its_attempts(pool, tmp_path):
    with pytest.raises(StageError, match=r"00001  TimeoutError: try again \(attempt 3\)"):
        run(pool, tmp_path, {"00001": "busy TimeoutError 9"})
    assert len(calls_of(tmp_path, "00001")) == 3


def test_which_errors_are_transient_is_named_by_class(pool, tmp_path):
    moods = {"00001": "busy StoreIsBusy 1"}
    with pytest.raises(StageError, match="00001  StoreIsBusy: try again"):
        run(pool, tmp_path, moods)
    (tmp_path / "calls").unlink()
    assert set(run(pool, tmp_path, moods, transient_errors=["StoreIsBusy"])) == set(NAMES)
    assert len(calls_of(tmp_path, "00001")) == 2


def test_transience_follows_bases_and_error_numbers():
    actors = ActorsConfig()
    assert is_transient(ConnectionResetError(), actors.transient_errors)
    assert is_transient(OSError(113, "No route to host"), actors.transient_errors)
    assert not is_transient(FileNotFoundError(2, "No such file"), actors.transient_errors)
    assert not is_transient(OSError(28, "No space left on device"), actors.transient_errors)


def test_a_shard_beyond_its_deadline_is_tried_again_by_another_actor(pool, tmp_path):
    start = time.monotonic()
    made = run(pool, tmp_path, {"00000": "hangs once"}, PairWorker, num_actors=1, deadline_sec=3)
    assert set(made) == set(NAMES)
    assert time.monotonic() - start < 50
    assert len(calls_of(tmp_path, "00000")) == 2
    care = [
        line.split()[1] for line in (tmp_path / "careful").read_text().splitlines() if line[:5] == "00000"
    ]
    assert care == ["None", "0.75"], "the second time, each sample has a quarter of the deadline"


def test_a_shard_always_beyond_its_deadline_fails_alone(pool, tmp_path, monkeypatch):
    # its neighbour in the same actor is done again, without blame
    monkeypatch.setattr(pool_module, "CAREFUL_DEADLINES", 2)
    moods = {"00000": "hangs always"}
    with pytest.raises(StageError, match="1 of 5 shards failed") as failure:
        run(pool, tmp_path, moods, PairWorker, num_actors=1, deadline_sec=2, max_attempts=2)
    assert "00000  took longer than its deadline, 4 s (attempt 2)" in str(failure.value)
    assert [is_complete(tmp_path, name) for name in NAMES] == [False, True, True, True, True]


def test_a_worker_that_cannot_start_says_why_at_once(pool, tmp_path):
    with pytest.raises(StageError, match="could not start: ValueError: no such model folder"):
        run(pool, tmp_path, {"start": "fails"})
    assert not (tmp_path / "calls").exists()


def test_an_actor_that_dies_while_it_starts_is_replaced(pool, tmp_path):
    assert set(run(pool, tmp_path, {"start once": ""})) == set(NAMES)


def test_idle_actors_that_died_between_stages_are_no_failed_start(pool, tmp_path):
    import ray

    run(pool, tmp_path, {})
    for actors in pool._idle.values():
        for actor in actors:
            ray.kill(actor)
    assert set(run(pool, tmp_path, {})) == set(NAMES)


def test_an_actor_larger_than_every_node_fails_at_once(pool, tmp_path):
    start = time.monotonic()
    message = r"test: no node has the 64 CPUs and 0 GPUs of one actor \(nodes: 2 CPUs, 0 GPUs\)"
    with pytest.raises(StageError, match=message):
        run(pool, tmp_path, {}, num_cpus=64)
    with pytest.raises(StageError, match=r"lower test\.actors\.num_cpus or num_gpus"):
        run(pool, tmp_path, {}, num_gpus=1)
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_cluster_that_is_busy_with_other_work_ends_in_an_error(pool, tmp_path, monkeypatch):
    import ray

    pool.close()
    monkeypatch.setattr(pool_module, "NO_ACTOR_SEC", 2.0)
    # two actors of one CPU each hold all of the cluster
    holders = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
    ray.get([holder.ready.remote() for holder in holders])
    try:
        with pytest.raises(StageError, match="test: no actor started within 2 s"):
            run(pool, tmp_path, {})
    finally:
        for holder in holders:
            ray.kill(holder)
    monkeypatch.undo()
    assert set(run(pool, tmp_path, {})) == set(NAMES)


class Holder:
    def ready(self) -> None:
        """Returns once the actor runs."""


@pytest.mark.parametrize(("worker", "patience_sec", "met"), [(PairMeeting, 30, True), (Meeting, 1, False)])
def test_an_actor_works_on_two_shards_at_once_only_where_its_worker_says_so(
    pool, tmp_path, worker, patience_sec, met
):
    jobs = [ShardJob(name, "f", {}, {"patience_sec": patience_sec}) for name in NAMES[:2]]
    arguments = {"folder": Folder(str(tmp_path))}
    found = run_shards(pool, "test", worker, arguments, jobs, ActorsConfig(num_actors=1))
    assert list(found.values()) == [met, met]


@pytest.mark.parametrize(
    ("concurrency", "actors", "number"),
    [
        (1, {"num_cpus": 8, "num_gpus": 1}, 1),
        (2, {"num_cpus": 8}, 2),
        (2, {"num_cpus": 1, "num_gpus": 1}, 2),
        (2, {"num_cpus": 7, "num_gpus": 0.5}, 7),
        (2, {"num_cpus": 64, "num_gpus": 1}, 16),
    ],
)
def test_an_actor_with_a_gpu_has_a_shard_in_flight_for_each_of_its_cpus(concurrency, actors, number):
    worker = type("Worker", (), {"concurrency": concurrency})
    assert shards_in_flight(worker, ActorsConfig(**actors)) == number
    assert shards_in_flight(object, ActorsConfig(**actors)) == 1
