"""One Ray actor pool over shards: a warm worker per actor, a bounded number in flight, per-shard commits, no
shard lost.

The death of an actor or of its node gives its shards back to the queue, and so does a transient error, after
a while; a shard that raises anything else is reported at the end, when all others are done. After a death or
a deadline the shard is made carefully: what can kill a process runs in one of its own, sample by sample.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, Field

from pipelines.runtime.metrics import StageMetrics, to_ray
from pipelines.runtime.progress import StageProgress
from pipelines.runtime.session import PATIENCE_SEC, StageError, brief, check_ray_lives
from pipelines.runtime.transient import TRANSIENT_ERRORS, is_transient
from repfusion.config import Config, weights_of
from repfusion.pretrained.cache import fetch

MAX_CONCURRENCY = 2
"""Threads of an actor: the most that a worker's `concurrency` can ask for."""
MAX_SHARDS_OF_A_GPU = 16
"""Shards in flight on an actor with a GPU, at most: each holds two batches in page-locked memory."""
MAX_FAILED_STARTS = 3
"""How often in a row the actor in one place of a pool may die before it is ready."""
CAREFUL_SEC = 60.0
CAREFUL_SHARE = 0.25
"""A sample that is made carefully may take so many seconds, and this share of its shard's deadline."""
CAREFUL_DEADLINES = 10
"""Deadlines that a shard has which is made carefully: processes that samples end are started again."""
NO_ACTOR_SEC = 600.0
"""How long a stage waits for its first actor to start, before it gives up."""


class ActorsConfig(Config):
    """Size and patience of a stage's actor pool. Changes no bytes."""

    num_actors: int | None = Field(default=None, ge=1)
    """Workers of the stage; None takes as many as the cluster has CPUs (or GPUs) for."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of each; its number of compute threads as well."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each, or a share of one."""
    deadline_sec: float | None = Field(default=None, gt=0)
    """How long one shard may take before its actor is killed and another tries; None waits for ever."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a shard is tried that meets a transient error, takes its actor down or exceeds the deadline.
    """
    backoff_sec: float = Field(default=1.0, ge=0)
    """Wait before the second attempt after a transient error; doubled for each further one."""
    transient_errors: tuple[str, ...] = TRANSIENT_ERRORS
    """Exceptions that another attempt may not meet, by class name or that of a base class."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: its name, the stage's fingerprint, the upstream shards it reads, and what else
    its worker needs.
    """

    name: str
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    careful_sec: float | None = None
    """Seconds that a sample may take in a process of its own; None makes all samples in the actor's."""


class ShardWorker(Protocol):
    """Lives in an actor for as long as the stage: models load once, in its constructor.

    A class with an attribute `concurrency` is called from that many threads at a time, so that one shard is
    read, decoded or written while another is computed.
    """

    def __call__(self, job: ShardJob) -> Any:
        """Makes and commits the shard; returns its sidecar. Whatever it raises fails this shard alone."""
        ...


def shards_in_flight(worker_class: type, actors: ActorsConfig) -> int:
    """How many shards an actor has at a time: as many as its worker's `concurrency` says; where it keeps a
    GPU busy with it, one for each of its CPUs, which read, decode, hash and write while the GPU computes.
    """
    least = min(getattr(worker_class, "concurrency", 1), MAX_CONCURRENCY)
    if least == 1 or not actors.num_gpus:
        return least
    return max(least, min(int(actors.num_cpus), MAX_SHARDS_OF_A_GPU))


class _ShardActor:
    """A process that serves one stage after the other: the imports, which take longer than small models,
    happen once.
    """

    _worker: ShardWorker | None = None

    def warm(self, worker_class: type, arguments: dict[str, Any]) -> None:
        self._worker = None
        fetch(_weights_among(arguments))
        self._worker = worker_class(**arguments)

    def run(self, job: ShardJob) -> Any:
        assert self._worker is not None
        return self._worker(job)


def _weights_among(arguments: Mapping[str, Any]) -> list[Path]:
    """Folders that a worker may load weights from."""
    found = [one for one in arguments.values() if isinstance(one, Path)]
    sections = (one for one in arguments.values() if isinstance(one, BaseModel))
    return found + [folder for section in sections for folder in weights_of(section).values()]


class ActorPool:
    """Idle actors of a Ray session, kept from stage to stage. They hold their CPUs until the pool is
    closed.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[float, float], list[Any]] = {}

    def take(self, actors: ActorsConfig) -> Any:
        """An idle actor of the size, or a new one."""
        import ray

        size = (actors.num_cpus, actors.num_gpus)
        for other in self._idle.keys() - {size}:
            # actors of another size would hold the resources that this stage waits for
            self.release(other)
        if idle := self._idle.get(size):
            return idle.pop()
        options = {
            "num_cpus": size[0],
            "num_gpus": size[1],
            "max_restarts": 0,
            "max_concurrency": MAX_SHARDS_OF_A_GPU if size[1] else MAX_CONCURRENCY,
        }
        return ray.remote(**options)(_ShardActor).remote()

    def give_back(self, actor: Any, actors: ActorsConfig) -> None:
        self._idle.setdefault((actors.num_cpus, actors.num_gpus), []).append(actor)

    def release(self, size: tuple[float, float]) -> None:
        import ray

        for actor in self._idle.pop(size, []):
            ray.kill(actor)

    def close(self) -> None:
        for size in list(self._idle):
            self.release(size)


def num_actors_that_fit(stage: str, actors: ActorsConfig) -> int:
    """The number of actors: as many as asked for, or as the connected cluster has resources for.

    Raises:
        StageError: where no node is large enough for one, which would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = 0
    for node in nodes:
        shares = [node.get("CPU", 0) / actors.num_cpus]
        if actors.num_gpus:
            shares.append(node.get("GPU", 0) / actors.num_gpus)
        fits += int(min(shares))
    if not fits:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise StageError(
            f"stage {stage}: no node has the {actors.num_cpus:g} CPUs and {actors.num_gpus:g} GPUs of one "
            f"actor (nodes: {have}); lower {stage}.actors.num_cpus or num_gpus, or raise ray.num_cpus"
        )
    return fits if actors.num_actors is None else actors.num_actors


@dataclass(eq=False)
class _Slot:
    """An actor and what it is doing."""

    actor: Any
    is_ready: bool = False
    jobs: dict[str, ShardJob] = field(default_factory=dict)
    """Jobs in flight, by name."""
    failed_starts: int = 0
    """Actors before it, in a row, that died before they were ready."""
    overdue: str | None = None
    """The shard for which it was killed."""
    is_shared: bool = False
    """Whether more than one shard was in flight when it died."""


class ShardRun:
    """One stage's jobs on their way through the pool.

    Args:
        pool: whose actors it takes.
        stage: the stage's name.
        worker_class: what lives in each actor.
        arguments: of its constructor.
        actors: how many, and how patient.
        metrics: what Prometheus is told.

    Raises:
        StageError: no node is large enough for one actor.
    """

    def __init__(
        self,
        pool: ActorPool,
        stage: str,
        worker_class: type,
        arguments: dict[str, Any],
        actors: ActorsConfig,
        metrics: StageMetrics,
    ):
        self.pool, self.stage, self.actors, self.metrics = pool, stage, actors, metrics
        self.worker_class, self.arguments = worker_class, arguments
        self.most_actors = num_actors_that_fit(stage, actors)
        self.concurrency = shards_in_flight(worker_class, actors)
        self.waiting: deque[ShardJob] = deque()
        self.delayed: list[tuple[float, ShardJob]] = []
        self.finished: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        self.suspects: set[str] = set()
        """Shards that were in flight when an actor died: they run alone, so that the next death names the
        culprit.
        """
        self.slots: list[_Slot] = []
        self.in_flight: dict[Any, tuple[_Slot, ShardJob | None, float]] = {}
        self.waits_since = self.looked = time.monotonic()

    @property
    def wants_actor(self) -> bool:
        """Whether another actor would have a shard to make."""
        return len(self.slots) < min(self.most_actors, self.num_waiting + self.num_busy)

    @property
    def num_busy(self) -> int:
        """Actors that have a shard."""
        return sum(bool(slot.jobs) for slot in self.slots)

    def start_actor(self, failed_starts: int = 0) -> None:
        slot = _Slot(self.pool.take(self.actors), failed_starts=failed_starts)
        self.slots.append(slot)
        ref = slot.actor.warm.remote(self.worker_class, self.arguments)
        self.in_flight[ref] = (slot, None, time.monotonic())

    @property
    def actor_states(self) -> Counter[str]:
        """How many actors are busy, idle and starting."""
        return Counter("busy" if one.jobs else "idle" if one.is_ready else "starting" for one in self.slots)

    @property
    def num_waiting(self) -> int:
        """Shards that no actor has."""
        return len(self.waiting) + len(self.delayed)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.delayed or any(job for _, job, _ in self.in_flight.values()))

    def assign(self) -> None:
        """Gives waiting shards to actors that have room."""
        now = time.monotonic()
        due = [job for when, job in self.delayed if when <= now]
        self.delayed = [(when, job) for when, job in self.delayed if when > now]
        self.waiting.extendleft(due)
        while self.waiting:
            free = [slot for slot in self.slots if slot.is_ready and self._has_room(slot)]
            if not free:
                return
            # the idle ones first: of the last shards, none waits behind another for an actor that is busy
            slot = min(free, key=lambda slot: len(slot.jobs))
            job = self.waiting.popleft()
            slot.jobs[job.name] = job
            self.in_flight[slot.actor.run.remote(job)] = (slot, job, time.monotonic())

    def _has_room(self, slot: _Slot) -> bool:
        if self.waiting[0].name in self.suspects or not self.suspects.isdisjoint(slot.jobs):
            return not slot.jobs
        return len(slot.jobs) < self.concurrency

    @property
    def next_moment(self) -> float:
        """When a deadline or a delayed shard comes (monotonic)."""
        moments = [when for when, _ in self.delayed]
        if self.actors.deadline_sec is not None:
            moments += [start + self._deadline_sec(job) for _, job, start in self.in_flight.values() if job]
        return min(moments, default=math.inf)

    def collect(self, ref: Any) -> str | None:
        """Takes one result; the name of the shard where one was completed."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        slot, job, _ = self.in_flight.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if job is None:
                raise StageError(f"stage {self.stage}: its worker could not start: {brief(error)}") from error
            slot.jobs.pop(job.name, None)
            cause = getattr(error, "cause", None) or error
            self._failed(job, brief(error), again=is_transient(cause, self.actors.transient_errors))
        except RayError as error:
            self._died(slot, job, error)
        else:
            if job is None:
                slot.is_ready, slot.failed_starts = True, 0
                return None
            del slot.jobs[job.name]
            self.suspects.discard(job.name)
            self.finished[job.name] = result
            self.metrics.completed(result)
            return job.name
        return None

    def _failed(self, job: ShardJob, message: str, again: bool) -> None:
        self.attempts[job.name] += 1
        attempts = self.attempts[job.name]
        if again and attempts < self.actors.max_attempts:
            self.delayed.append((time.monotonic() + self.actors.backoff_sec * 2 ** (attempts - 1), job))
            return
        self.suspects.discard(job.name)
        self.failures[job.name] = f"{message} (attempt {attempts})" if attempts > 1 else message

    def _died(self, slot: _Slot, job: ShardJob | None, error: BaseException) -> None:
        """The actor or its node is gone: what it held goes back, and another actor is asked for."""
        if slot in self.slots:
            slot.is_shared = len(slot.jobs) > 1
            failed_starts = 0 if slot.is_ready else slot.failed_starts + 1
            if failed_starts > MAX_FAILED_STARTS:
                raise StageError(
                    f"stage {self.stage}: its actors die while they start: {brief(error)}"
                ) from error
            self._replace(slot, failed_starts)
        if job is None:
            return
        slot.jobs.pop(job.name, None)
        careful = replace(job, careful_sec=self._careful_sec())
        if slot.overdue == job.name:
            self._failed(careful, f"took longer than its deadline, {self._deadline_sec(job):g} s", again=True)
        elif slot.overdue is not None:
            self.waiting.appendleft(job)
        elif slot.is_shared:
            self.suspects.add(job.name)
            self.waiting.appendleft(careful)
        else:
            self.suspects.add(job.name)
            self._failed(careful, f"its actor died: {brief(error)}", again=True)

    def _deadline_sec(self, job: ShardJob) -> float:
        assert self.actors.deadline_sec is not None
        return self.actors.deadline_sec * (1 if job.careful_sec is None else CAREFUL_DEADLINES)

    def _careful_sec(self) -> float:
        deadline = self.actors.deadline_sec
        return CAREFUL_SEC if deadline is None else min(CAREFUL_SEC, CAREFUL_SHARE * deadline)

    def _replace(self, slot: _Slot, failed_starts: int = 0) -> None:
        """Asks for another actor; the old one, out of reach or overdue, must not keep its resources."""
        import ray

        self.slots.remove(slot)
        ray.kill(slot.actor)
        self.start_actor(failed_starts)

    def look(self) -> None:
        """Tells Prometheus how it stands."""
        at_work = sum(len(slot.jobs) for slot in self.slots)
        self.metrics.look(self.actor_states, self.num_waiting, self.num_waiting + at_work)

    def kill_overdue(self) -> None:
        if self.actors.deadline_sec is None:
            return
        now = time.monotonic()
        for slot, job, start in list(self.in_flight.values()):
            if job is not None and slot in self.slots and now - start > self._deadline_sec(job):
                slot.overdue = job.name
                self._replace(slot)

    def check_progress(self) -> None:
        """Raises StageError where no actor has come up for long: the cluster is full, or has shrunk; sooner,
        where it is gone.
        """
        now = time.monotonic()
        if not self.slots or any(slot.is_ready for slot in self.slots):
            self.waits_since = self.looked = now
            return
        if now - self.looked > PATIENCE_SEC:
            check_ray_lives()
            self.looked = now
        if now - self.waits_since > NO_ACTOR_SEC:
            raise StageError(
                f"stage {self.stage}: no actor started within {NO_ACTOR_SEC:g} s; is the cluster busy with "
                "other jobs, or its nodes gone? The finished shards are kept"
            )

    def release_idle(self) -> bool:
        """Gives one idle actor back to the pool; whether there was one."""
        for slot in self.slots:
            if slot.is_ready and not slot.jobs:
                self.slots.remove(slot)
                self.pool.give_back(slot.actor, self.actors)
                return True
        return False

    def end(self) -> None:
        """Idle actors go back to the pool, others are killed."""
        import ray

        while self.release_idle():
            pass
        for slot in self.slots:
            ray.kill(slot.actor)
        self.slots.clear()

    def check_failures(self, total: int) -> None:
        """Raises StageError, with a table, where some of the stage's `total` shards failed."""
        if self.failures:
            raise StageError(_failure_table(self.stage, self.failures, total))


def carry_on(runs: Sequence[ShardRun]) -> list[tuple[ShardRun, str]]:
    """Gives waiting shards to actors, waits for something to happen, and returns the shards that were
    completed.

    Raises:
        StageError: a worker cannot start, or no actor comes up for long.
    """
    for run in runs:
        run.assign()
        run.look()
    refs = {ref: run for run in runs for ref in run.in_flight}
    timeout = max(0.0, min([run.next_moment for run in runs]) - time.monotonic())
    completed: list[tuple[ShardRun, str]] = []
    for ref in _done(list(refs), min(timeout, PATIENCE_SEC)):
        if name := refs[ref].collect(ref):
            completed.append((refs[ref], name))
    for run in runs:
        run.metrics.failed(len(run.failures))
        run.kill_overdue()
        run.check_progress()
    return completed


def _done(refs: list[Any], timeout_sec: float) -> list[Any]:
    import ray

    if refs:
        return ray.wait(refs, num_returns=1, timeout=timeout_sec)[0]
    time.sleep(timeout_sec)
    return []


def run_shards(
    pool: ActorPool,
    stage: str,
    worker_class: type,
    arguments: dict[str, Any],
    jobs: Iterable[ShardJob],
    actors: ActorsConfig,
    done: int = 0,
    workflow: str = "",
) -> dict[str, Any]:
    """Runs the jobs on a pool of actors, in a Ray session, and returns what the worker made of each, by
    shard.

    `done` shards were complete before; what is shown counts them. Prometheus is told of the stage under
    the name of the `workflow`.

    Raises:
        StageError: after all other shards are done, where some failed; at once, where no worker can start.
    """
    with StageMetrics(to_ray(), workflow, stage) as metrics:
        run = ShardRun(pool, stage, worker_class, arguments, actors, metrics)
        run.waiting.extend(jobs)
        total = done + len(run.waiting)
        try:
            with StageProgress(stage, total, done) as progress:
                while run.wants_actor:
                    run.start_actor()
                while run.is_busy:
                    for _, name in carry_on([run]):
                        progress.completed(run.finished[name])
        finally:
            run.end()
    run.check_failures(total)
    return run.finished


def _failure_table(stage: str, failures: dict[str, str], total: int) -> str:
    rows = [f"  {name}  {message}" for name, message in sorted(failures.items())]
    title = f"stage {stage}: {len(failures)} of {total} shards failed; the others are complete"
    return "\n".join([title, "  shard  error", *rows, "  run it again to do only these"])
