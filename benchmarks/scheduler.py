"""The pool of actors that makes a stage's shards, on a cluster of which time and nodes are simulated: share
of the ideal, and what the driver takes.

The pool's own code runs as it is; beneath it stand actors that take the times that were recorded (image
features of a VAE, 20 shards, 2 CPU cores), drawn again for every shard. One shard in 100 takes ten times as
long, one actor in 20 starts ten times as slowly, nodes die and come back. The ideal is all work, each shard
once, on the GPUs that are there, without a moment between. `overlap` is the chain ingest, judge, curate,
encode, the first on the CPUs of the same nodes and about as long as encoding.

    python benchmarks/scheduler.py [--num-shards 100000] [--nodes 16] [--gpus 4] [--mode stage]
"""

import argparse
import heapq
import itertools
import json
import random
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from pipelines.runtime import pool as pool_module
from pipelines.runtime.metrics import StageMetrics
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, ShardRun, carry_on, run_shards
from pipelines.runtime.sharing import share_out
from pipelines.shards.store import Sidecar, shard_name

RECORDED_SEC = (
    *(36.327, 35.169, 34.644, 35.614, 35.725, 35.081, 36.138, 35.928, 31.762, 31.43),
    *(31.468, 31.43, 36.406, 33.472, 36.886, 34.332, 43.653, 44.843, 41.798, 42.535),
)
STRAGGLERS, SLOW_STARTS, FACTOR = 0.01, 0.05, 10.0
START_SEC = 30.0
"""How long an actor takes to import torch and load a tower."""
LIFE_SEC, REPAIR_SEC = 24 * 3600.0, 600.0
"""Mean time between deaths of a node, and how long one is away."""
CPUS_A_GPU = 8


@dataclass(eq=False)
class Ref:
    actor: "Actor"
    value: Any = None
    is_done: bool = False


@dataclass(eq=False)
class Actor:
    needs: dict[str, float]
    node: "Node | None" = None
    is_dead: bool = False
    waits: deque[Callable[[], None]] = field(default_factory=deque)
    """Calls before it was placed."""
    open: set[Ref] = field(default_factory=set)


@dataclass(eq=False)
class Node:
    free: dict[str, float]
    total: dict[str, float]
    is_alive: bool = True
    actors: set[Actor] = field(default_factory=set)
    up_since: float = 0.0
    up_sec: float = 0.0
    """Seconds in earlier lives."""


class SimulatedRay:
    """What the pool asks of Ray, in simulated seconds."""

    def __init__(self, num_nodes: int, gpus: int, seed: int, life_sec: float):
        self.now, self.random, self.life_sec = 0.0, random.Random(seed), life_sec
        resources = {"CPU": float(CPUS_A_GPU * gpus), "GPU": float(gpus)}
        self.all_nodes = [Node(dict(resources), resources) for _ in range(num_nodes)]
        self.unplaced: deque[Actor] = deque()
        self.events: list[tuple[float, int, Callable[[], Ref | None]]] = []
        self.counter, self.num_deaths = itertools.count(), 0
        for node in self.all_nodes:
            self._later(self.random.expovariate(1 / life_sec), lambda node=node: self._die(node))

    def _later(self, seconds: float, act: Callable[[], Ref | None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.counter), act))

    def _die(self, node: Node) -> None:
        self.num_deaths += 1
        node.is_alive, node.up_sec = False, node.up_sec + self.now - node.up_since
        for actor in list(node.actors):
            self._end(actor)
        self._later(REPAIR_SEC, lambda: self._come_back(node))

    def _come_back(self, node: Node) -> None:
        node.is_alive, node.free, node.up_since = True, dict(node.total), self.now
        self._later(self.random.expovariate(1 / self.life_sec), lambda: self._die(node))
        self._place()

    def _end(self, actor: Actor) -> None:
        actor.is_dead = True
        for ref in list(actor.open):
            ref.is_done, ref.value = True, ActorDiedError()
        actor.open.clear()
        if actor.node is not None:
            actor.node.actors.discard(actor)
            for name, amount in actor.needs.items():
                actor.node.free[name] += amount
            actor.node = None

    def _place(self) -> None:
        for actor in [self.unplaced.popleft() for _ in range(len(self.unplaced))]:
            fitting = (
                node
                for node in self.all_nodes
                if node.is_alive and all(node.free[name] >= amount for name, amount in actor.needs.items())
            )
            if actor.is_dead:
                continue
            if (node := next(fitting, None)) is None:
                self.unplaced.append(actor)
                continue
            actor.node = node
            node.actors.add(actor)
            for name, amount in actor.needs.items():
                node.free[name] -= amount
            while actor.waits:
                actor.waits.popleft()()

    def _call(self, actor: Actor, seconds: float, value: Any) -> Ref:
        ref = Ref(actor)
        if actor.is_dead:
            ref.is_done, ref.value = True, ActorDiedError()
            return ref
        actor.open.add(ref)

        def done() -> Ref | None:
            if ref.is_done:
                return None
            actor.open.discard(ref)
            ref.is_done, ref.value = True, value
            return ref

        def begin() -> None:
            self._later(seconds, done)

        begin() if actor.node is not None else actor.waits.append(begin)
        return ref

    # the part of Ray's interface that the pool uses

    def remote(self, num_cpus: float, num_gpus: float, **_: Any) -> Callable[[type], Any]:
        def make() -> Any:
            actor = Actor({"CPU": num_cpus, "GPU": num_gpus})
            self.unplaced.append(actor)
            self._place()
            slow = FACTOR if self.random.random() < SLOW_STARTS else 1.0

            def warm(worker: type, arguments: Mapping[str, Any]) -> Ref:
                self.made[id(actor)] = arguments["make"]
                return self._call(actor, slow * arguments["start_sec"], None)

            def run(job: ShardJob) -> Ref:
                return self._call(actor, job.arguments["seconds"], self.made[id(actor)](job))

            return SimpleNamespace(
                actor=actor, warm=SimpleNamespace(remote=warm), run=SimpleNamespace(remote=run)
            )

        return lambda cls: SimpleNamespace(remote=make)

    made: dict[int, Callable[[ShardJob], Sidecar]] = {}

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        deadline, wanted = self.now + timeout, set(refs)
        done = [ref for ref in refs if ref.is_done]
        while not done and self.events and self.events[0][0] <= deadline:
            self.now, _, act = heapq.heappop(self.events)
            ref = act()
            if ref is None:  # a node died or came back
                done = [ref for ref in refs if ref.is_done]
            elif ref in wanted:
                done = [ref]
        if not done:
            self.now = max(self.now, deadline)
        return done[:num_returns], []

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, handle: Any) -> None:
        self._end(handle.actor)
        self._place()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": node.is_alive, "Resources": node.total} for node in self.all_nodes]

    def cluster_resources(self) -> dict[str, float]:
        alive = [node.total for node in self.all_nodes if node.is_alive]
        return {name: sum(one[name] for one in alive) for name in ("CPU", "GPU")}

    def sleep(self, seconds: float) -> None:
        self.wait([], 1, seconds)

    def gpu_sec(self) -> float:
        """GPU seconds that were there up to now."""
        return sum(
            node.total["GPU"] * (node.up_sec + (self.now - node.up_since if node.is_alive else 0.0))
            for node in self.all_nodes
        )


@contextmanager
def simulated(cluster: SimulatedRay) -> Iterator[None]:
    """Puts the simulation in the place of Ray and of the pool's clock."""
    names = ("remote", "wait", "get", "kill", "nodes", "cluster_resources")
    before = {name: getattr(ray, name) for name in names}
    clock = SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep)
    for name in names:
        setattr(ray, name, getattr(cluster, name))
    pool_module.time, real = clock, pool_module.time
    pool_module.to_ray, to_ray = (lambda: nowhere), pool_module.to_ray
    try:
        yield
    finally:
        pool_module.time, pool_module.to_ray = real, to_ray
        for name, value in before.items():
            setattr(ray, name, value)


def nowhere(metric: object, value: float, labels: object) -> None:
    """Prometheus is told nothing."""


class Encode:
    """Stands for a worker."""


def sidecar_of(job: ShardJob) -> Sidecar:
    """A sidecar of about the size of a real one."""
    return Sidecar(
        name=job.name,
        file=f"{job.name}.tar",
        fingerprint="f" * 64,
        inputs={"curate": "a" * 64},
        samples=1000,
        bytes=10240,
        sha256="b" * 64,
        drops={},
        files={},
        seconds=job.arguments["seconds"],
        versions={"repfusion": "0.1.0", "torch": "2.13.0"},
    )


def draw_jobs(number: int, seed: int, share: float = 1.0) -> list[ShardJob]:
    """Shards of times that were recorded, or of a share of those; some are stragglers."""
    chance = random.Random(seed)
    return [
        ShardJob(
            shard_name(index),
            "f" * 64,
            {"curate": "a" * 64},
            {
                "seconds": share
                * chance.choice(RECORDED_SEC)
                * (FACTOR if chance.random() < STRAGGLERS else 1.0)
            },
        )
        for index in range(number)
    ]


def run_stage(cluster: SimulatedRay, number: int) -> float:
    """One stage on all GPUs; GPU seconds of its work."""
    jobs = draw_jobs(number, 1)
    arguments = {"make": sidecar_of, "start_sec": START_SEC}
    with simulated(cluster):
        made = run_shards(ActorPool(), "encode", Encode, arguments, jobs, ActorsConfig(num_gpus=1))
    assert made.keys() == {job.name for job in jobs}
    return sum(job.arguments["seconds"] for job in jobs)


def run_chain(cluster: SimulatedRay, number: int) -> float:
    """Four stages, each shard going on at once; GPU seconds of the last one's work."""
    parts = {"ingest": CPUS_A_GPU - 2.0, "judge": 0.5, "curate": 0.2, "encode": 1.0}
    jobs = {
        name: {job.name: job for job in draw_jobs(number, seed, share)}
        for seed, (name, share) in enumerate(parts.items())
    }
    gpus = {"encode": 1}
    with simulated(cluster):
        pool = ActorPool()
        runs = [
            ShardRun(
                pool,
                name,
                Encode,
                {"make": sidecar_of, "start_sec": START_SEC},
                ActorsConfig(num_gpus=gpus.get(name, 0)),
                StageMetrics(nowhere, "w", name),
            )
            for name in parts
        ]
        following = dict(zip(parts, runs[1:], strict=False))
        runs[0].waiting.extend(jobs["ingest"].values())
        num_made = 0
        while any(run.is_busy for run in runs):
            share_out(runs, cluster.cluster_resources())
            for run, name in carry_on(runs):
                num_made += run.stage == "encode"
                run.finished.pop(name)
                if run.stage in following:
                    following[run.stage].waiting.append(jobs[following[run.stage].stage][name])
    assert num_made == number
    return sum(job.arguments["seconds"] for job in jobs["encode"].values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-shards", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=4, help="of a node")
    parser.add_argument("--life-hours", type=float, default=LIFE_SEC / 3600, help="mean, of a node")
    parser.add_argument("--mode", choices=["stage", "overlap"], default="stage")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cluster = SimulatedRay(args.nodes, args.gpus, args.seed, 3600 * args.life_hours)
    before, started = time.process_time(), time.perf_counter()
    work = (run_stage if args.mode == "stage" else run_chain)(cluster, args.num_shards)
    cpu_sec = time.process_time() - before
    print(
        json.dumps(
            {
                "mode": args.mode,
                "num_shards": args.num_shards,
                "gpus": args.nodes * args.gpus,
                "hours": round(cluster.now / 3600, 3),
                "of_ideal": round(work / cluster.gpu_sec(), 4),
                "node_deaths": cluster.num_deaths,
                "driver_cores": round(cpu_sec / cluster.now, 5),
                "driver_cpu_sec": round(cpu_sec, 1),
                "driver_ms_a_shard": round(1000 * cpu_sec / args.num_shards, 3),
                "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "measured_sec": round(time.perf_counter() - started, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
