"""One Ray actor pool over shards: a warm worker per actor, one shard in flight each, per-shard commits, and
no shard lost.

An actor's death gives its shard back to the queue; a shard that raises is reported at the end, after all
others are done.
"""

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from pipelines.store import Sidecar

MAX_DEATHS = 3
"""How often a shard may take its actor down before it counts as failed."""


class RayConfig(BaseModel):
    """How to reach or start Ray. Changes no bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str | None = None
    """A running cluster's address; None takes RAY_ADDRESS from the environment or starts a local one for
    this run.
    """
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; None counts the machine's. More than it has lets evaluation run
    beside training.
    """
    object_store_mib: int = Field(default=128, ge=80)
    """Shared memory of a local cluster. Samples do not pass through it, so it stays small."""
    log_to_driver: bool = False
    """Whether the workers' output appears on the terminal."""


class ActorsConfig(BaseModel):
    """Size of a stage's actor pool. Changes no bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_actors: int | None = Field(default=None, ge=1)
    """Workers of the stage; None takes as many as the cluster has CPUs (or GPUs) for."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of each; its number of compute threads as well."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of each, or a share of one."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: its name, the stage's fingerprint, the upstream shards it reads, and what else
    its worker needs.
    """

    name: str
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


class ShardWorker(Protocol):
    """Lives in an actor for as long as the stage: models load once, in its constructor."""

    def __call__(self, job: ShardJob) -> Sidecar:
        """Makes and commits the shard. Whatever it raises fails this shard alone."""
        ...


class StageError(RuntimeError):
    """A stage that could not complete; its finished shards stay."""


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connects to a cluster, or starts a local one on loopback and stops it in the end. Within a session,
    does nothing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {
        "namespace": "repfusion",
        "log_to_driver": config.log_to_driver,
        "logging_level": "ERROR",
    }
    if address:
        settings["address"] = address
    else:
        settings |= {
            "address": "local",
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mib << 20,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        # Through the environment and not a runtime_env: workers that Ray has started ahead would
        # not fit the latter.
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        inherited = {"PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}
        with _environment(inherited):
            ray.init(**settings)
    if address:
        ray.init(**settings)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _ShardActor:
    """A process that serves one stage after the other: the imports, which take longer than small models,
    happen once.
    """

    _worker: ShardWorker | None = None

    def warm(self, worker_class: type, arguments: dict[str, Any]) -> None:
        self._worker = None
        self._worker = worker_class(**arguments)

    def run(self, job: ShardJob) -> Sidecar:
        assert self._worker is not None
        return self._worker(job)


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
        return ray.remote(num_cpus=size[0], num_gpus=size[1], max_restarts=0)(_ShardActor).remote()

    def give_back(self, actor: Any, actors: ActorsConfig) -> None:
        self._idle.setdefault((actors.num_cpus, actors.num_gpus), []).append(actor)

    def release(self, size: tuple[float, float]) -> None:
        import ray

        for actor in self._idle.pop(size, []):
            ray.kill(actor)

    def close(self) -> None:
        for size in list(self._idle):
            self.release(size)


def default_num_actors(actors: ActorsConfig) -> int:
    """As many actors as the connected cluster has resources for, at least one."""
    if actors.num_actors is not None:
        return actors.num_actors
    import ray

    resources = ray.cluster_resources()
    fits = [resources.get("CPU", 1) / actors.num_cpus]
    if actors.num_gpus:
        fits.append(resources.get("GPU", 0) / actors.num_gpus)
    return max(1, int(min(fits)))


def run_shards(
    pool: ActorPool,
    stage: str,
    worker_class: type,
    arguments: dict[str, Any],
    jobs: Sequence[ShardJob],
    actors: ActorsConfig,
    done: int = 0,
) -> list[Sidecar]:
    """Runs the jobs on a pool of actors, in a Ray session, and returns their sidecars in the order of the
    jobs.

    `done` shards were complete before; the progress bar counts them.

    Raises:
        StageError: after all other shards are done, where some failed; at once, where no worker can start.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    waiting = deque(jobs)
    finished: dict[str, Sidecar] = {}
    failures: dict[str, str] = {}
    deaths: Counter[str] = Counter()
    failed_starts = 0
    in_flight: dict[Any, tuple[Any, ShardJob | None]] = {}

    def start_actor() -> None:
        actor = pool.take(actors)
        in_flight[actor.warm.remote(worker_class, arguments)] = (actor, None)

    for _ in range(min(default_num_actors(actors), len(jobs))):
        start_actor()
    bar = tqdm(
        total=done + len(jobs),
        initial=done,
        desc=stage,
        unit="shard",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    try:
        while in_flight:
            ready, _ = ray.wait(list(in_flight), num_returns=1)
            actor, job = in_flight.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except RayTaskError as error:
                if job is None:
                    raise StageError(f"stage {stage}: its worker could not start: {_brief(error)}") from error
                failures[job.name] = _brief(error)
            except RayError as error:
                # the actor or its node died: another takes over what it held
                if job is None:
                    failed_starts += 1
                    if failed_starts > MAX_DEATHS:
                        raise StageError(
                            f"stage {stage}: its actors die while they start: {_brief(error)}"
                        ) from error
                else:
                    deaths[job.name] += 1
                    if deaths[job.name] < MAX_DEATHS:
                        waiting.appendleft(job)
                    else:
                        failures[job.name] = f"its actor died {MAX_DEATHS} times: {_brief(error)}"
                if waiting:
                    start_actor()
                continue
            else:
                if job is not None:
                    finished[job.name] = result
                    bar.update()
            if waiting:
                following = waiting.popleft()
                in_flight[actor.run.remote(following)] = (actor, following)
            else:
                pool.give_back(actor, actors)
    finally:
        bar.close()
        for actor, _ in in_flight.values():
            ray.kill(actor)
    if failures:
        raise StageError(_failure_table(stage, failures, len(finished) + done))
    return [finished[job.name] for job in jobs]


def _brief(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"


def _failure_table(stage: str, failures: dict[str, str], complete: int) -> str:
    rows = [f"  {name}  {message}" for name, message in sorted(failures.items())]
    total = len(failures) + complete
    title = f"stage {stage}: {len(failures)} of {total} shards failed; the others are complete"
    return "\n".join([title, "  shard  error", *rows, "  run it again to do only these"])
