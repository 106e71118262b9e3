"""`python tests/support/counted_run.py CONFIG CALLS`: a workflow whose workers write a line to the file
CALLS at the start and the end of every call: what, stage, shard, node.

SHARD_SEC in the environment: how long a call takes at least; NO_ACTOR_SEC: the pool's patience.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.build import data_stages
from pipelines.config import WorkflowConfig
from pipelines.dag import ShardStage
from pipelines.runtime import pool
from pipelines.runtime.pool import ShardJob
from pipelines.runtime.session import StageError
from pipelines.workflow.run import run
from repfusion.config import load_config


def counted(stage: ShardStage, calls: Path, shard_sec: float) -> ShardStage:
    class Counted(stage.worker):
        def __call__(self, job: ShardJob) -> Any:
            import ray

            node = ray.get_runtime_context().get_node_id()
            self._note("start", job, node)
            time.sleep(shard_sec)
            made = super().__call__(job)
            self._note("end", job, node)
            return made

        def _note(self, what: str, job: ShardJob, node: str) -> None:
            # one write of few bytes: lines of several actors do not mix
            with calls.open("a") as stream:
                stream.write(f"{what} {stage.name} {job.name} {node}\n")

    return replace(stage, worker=Counted)


def main() -> int:
    config, calls = load_config(WorkflowConfig, Path(sys.argv[1])), Path(sys.argv[2])
    shard_sec = float(os.environ.get("SHARD_SEC", 0))
    pool.NO_ACTOR_SEC = float(os.environ.get("NO_ACTOR_SEC", pool.NO_ACTOR_SEC))
    stages = [counted(stage, calls, shard_sec) for stage in data_stages(config)]
    try:
        run(stages, config.root, config.ray)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
