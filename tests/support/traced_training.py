"""`python tests/support/traced_training.py CONFIG.yaml TRACES`: the train stage of a workflow, whose ranks
write to the folder TRACES who they are and what they read: ATTEMPT-RANK.jsonl.

STEP_SEC in the environment: how long a step takes at least; KILL=RANK:STEP: that rank kills itself when it
has read the batch of that step, KILL_TIMES (1) times.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines.runtime.ranks
import pipelines.stages.train
from pipelines.commands import terminate, terminated_by
from pipelines.config import WorkflowConfig
from pipelines.runtime.session import StageError
from repfusion.config import load_config


@dataclass(frozen=True)
class Read:
    step: int
    time: float
    """Seconds since 1970."""
    keys: tuple[str, ...]


@dataclass(frozen=True)
class RankTrace:
    """What one rank of one attempt wrote."""

    attempt: str
    rank: int
    world_size: int
    pid: int
    node: str
    started: float
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Fault:
    """What is done to a training."""

    step_sec: float = 0.0
    """How long a step takes at least."""
    kill: tuple[int, int] | None = None
    """(rank, step): SIGKILL of itself."""
    kill_times: int = 1


def traced(launch: dict[str, Any], traces: Path, fault: Fault) -> None:
    """`pipelines.runtime.ranks.train_rank`, on a rank."""
    import ray

    from pipelines.runtime.ranks import train_rank
    from repfusion import train as training

    rank, batches = int(os.environ["RANK"]), training.batches
    # every attempt has a port of its own
    path = traces / f"{os.environ['MASTER_PORT']}-{rank}.jsonl"
    node = ray.get_runtime_context().get_node_id()
    who = {"world_size": int(os.environ["WORLD_SIZE"]), "pid": os.getpid(), "node": node}
    path.write_text(json.dumps({**who, "started": time.time()}) + "\n")

    def recorded(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with path.open("a") as stream:
            for step, parts in enumerate(batches(*args, **kwargs), kwargs["first_step"]):
                keys = [key for part in parts for key in part.keys]
                stream.write(json.dumps({"step": step, "time": time.time(), "keys": keys}) + "\n")
                stream.flush()
                time.sleep(fault.step_sec)
                killed = len(list(traces.glob("*.killed")))
                if fault.kill == (rank, step) and killed < fault.kill_times:
                    path.with_suffix(".killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield parts

    training.batches = recorded
    try:
        train_rank(launch)
    finally:
        training.batches = batches


def trace_ranks(traces: Path, fault: Fault = Fault()) -> Any:
    """A function that can take the place of `pipelines.runtime.ranks.train_rank`."""
    from ray import cloudpickle

    # the ranks cannot import this module
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    traces.mkdir(parents=True, exist_ok=True)
    traces = traces.resolve()

    def train_rank(launch: dict[str, Any]) -> None:
        traced(launch, traces, fault)

    return train_rank


def read_traces(traces: Path) -> list[list[RankTrace]]:
    """By attempt, in order, and rank."""
    found: dict[str, list[RankTrace]] = {}
    for path in traces.glob("*.jsonl"):
        attempt, _, rank = path.stem.partition("-")
        # a rank that was killed may have left half a line
        lines = [
            json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]
        if not lines:  # a rank that has just begun
            continue
        reads = tuple(Read(one["step"], one["time"], tuple(one["keys"])) for one in lines[1:])
        found.setdefault(attempt, []).append(RankTrace(attempt, int(rank), **lines[0], reads=reads))
    attempts = [sorted(ranks, key=lambda one: one.rank) for ranks in found.values()]
    return sorted(attempts, key=lambda ranks: ranks[0].started)


def main() -> int:
    config, traces = load_config(WorkflowConfig, Path(sys.argv[1])), Path(sys.argv[2])
    rank, _, step = os.environ.get("KILL", "").partition(":")
    fault = Fault(
        step_sec=float(os.environ.get("STEP_SEC", 0)),
        kill=(int(rank), int(step)) if step else None,
        kill_times=int(os.environ.get("KILL_TIMES", 1)),
    )
    pipelines.runtime.ranks.train_rank = trace_ranks(traces, fault)
    signal.signal(signal.SIGTERM, terminate)
    try:
        train = config.trainings["train"]
        ranks = train.num_workers, train.max_failures
        pipelines.stages.train.run_train(config.training("train"), *ranks, [], config.evaluate, config.ray)
    except (ValueError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + (terminated_by[0] if terminated_by else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
