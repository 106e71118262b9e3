"""What the tests of whole workflows share: run one, wait for a moment of it, compare what lies on disk."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.dag import Stage
from pipelines.runtime.pool import ActorPool
from pipelines.shards.manifest import MANIFEST, SHARDS, Manifest
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA
from pipelines.workflow.inspection import STAGE, State, states
from pipelines.workflow.run import Redo, StageResult, run

DATA_STAGES = ["source", "ingest", "judge", "curate", "image_features", "prompt_features"]
TIMES = {"seconds", "shard_seconds", "versions"}
"""Fields of sidecars and manifests that may differ from run to run."""
LIMIT_SEC = 400


def run_all(
    config: WorkflowConfig,
    pool: ActorPool,
    redo: Redo = {},  # noqa: B006  never written to
) -> tuple[dict[str, StageResult], list[str]]:
    """The results by stage, and the lines that were said."""
    said: list[str] = []
    stages = build_stages(config)
    results = run(stages, config.root, config.ray, said.append, pool, redo, config.overlap)
    return {result.name: result for result in results}, said


def ran(results: dict[str, StageResult]) -> list[str]:
    """The stages that were not skipped."""
    return [name for name, result in results.items() if not result.skipped]


def manifests(results: dict[str, StageResult]) -> dict[str, Manifest]:
    return {name: result.manifest for name, result in results.items()}


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a moment of a run in a process of its own, which has to be alive until then."""
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, f"over too early: {process.returncode}\n{log.read_text()}"
        assert time.monotonic() - start < LIMIT_SEC, log.read_text()
        time.sleep(0.02)


def start_training(stage: Stage) -> None:
    """Leaves what a training that was started leaves, for `status` to look at."""
    asked = {
        "schema": SCHEMA,
        "fingerprint": stage.fingerprint,
        "fields": stage.shown,
        "lineage": stage.lineage,
    }
    stage.folder.write(STAGE, json.dumps(asked).encode())


def found(config: WorkflowConfig) -> dict[str, State]:
    return states(build_stages(config))


def statuses(config: WorkflowConfig) -> dict[str, str]:
    return {name: state.status for name, state in found(config).items()}


def data_files(folder: Folder) -> dict[str, Any]:
    """Every file of the data stages by its path: bytes, of JSON the value without times. The tables of
    shards, which hold times too, are left out; the manifests hold their digests.
    """
    files: dict[str, Any] = {}
    for stage in DATA_STAGES:
        place = folder / stage
        data: Any
        for name, data in place.read_many(sorted(place.names() - {SHARDS})):
            if name.endswith(".json"):
                data = {key: value for key, value in json.loads(data).items() if key not in TIMES}
            files[f"{stage}/{name}"] = data
    return files


def file_times(root: Path) -> dict[Path, int]:
    """When each file and folder was written, in nanoseconds; of locks, which name who came last, nothing."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if not path.name.endswith(".lock")}


def shard_times(root: Path) -> dict[str, int]:
    """When each data file was written, in nanoseconds; what every run of a stage writes is left out."""
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns
        for stage in DATA_STAGES
        for path in sorted((root / stage).iterdir())
        if path.is_file() and path.name not in (MANIFEST, SHARDS, "stage.json")
    }
