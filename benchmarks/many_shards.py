"""`status`, `plan` and a re-run with nothing to do, on a workflow of many shards: seconds and peak memory of
each.

Shards are simulated: sidecars, manifests and files of the right sizes (sparse, no content), as a complete run
leaves them, in every data stage of the demo.

    python benchmarks/many_shards.py [--num-shards 100000] [--root FOLDER]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from pipelines.build import data_stages
from pipelines.config import WorkflowConfig
from pipelines.dag import ShardStage
from pipelines.duplicates.find import DUPLICATES
from pipelines.shards.manifest import ShardTable, StageOutput
from pipelines.shards.store import SCHEMA, Sidecar, SideFile
from pipelines.stages.image_features import STATISTICS
from pipelines.workflow.inspection import STAGE
from pipelines.workflow.run import complete
from repfusion.config import load_config, to_yaml
from repfusion.files import json_bytes

SHARD_SIZE = 1000
SIDE_FILES = {"source": "{}.images.tar", "image_features": "{}.statistics.safetensors"}
STAGE_FILES = {"judge": [DUPLICATES], "image_features": [STATISTICS]}
BYTES = 10240
TARGET_SEC, TARGET_BYTES = 10, 1 << 30


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


def simulate(stage: ShardStage, above: dict[str, StageOutput]) -> StageOutput:
    """Leaves a stage as if it had run."""
    folder = stage.folder.path
    folder.mkdir(parents=True)
    extension = "parquet" if stage.name in ("source", "judge") else "tar"
    sidecars = []
    for name, inputs in zip(stage.shard_names(above), stage.shard_inputs(above), strict=True):
        files = {}
        if pattern := SIDE_FILES.get(stage.name):
            files = {pattern.format(name): SideFile(bytes=BYTES, sha256="b" * 64)}
        sidecar = Sidecar(
            name=name,
            file=f"{name}.{extension}",
            fingerprint=stage.fingerprint,
            inputs=json.loads(inputs),
            samples=SHARD_SIZE,
            bytes=BYTES,
            sha256=hashlib.sha256(f"{stage.name}{name}".encode()).hexdigest(),
            drops={"http_404": 3} if stage.name == "ingest" else {},
            files=files,
            seconds=1.5,
            versions={"repfusion": "0.1.0", "pillow": "12.0.0"},
        )
        for file in (sidecar.file, *files):
            sparse(folder / file, BYTES)
        (folder / f"{name}.json").write_bytes(json_bytes(sidecar.model_dump(mode="json")))
        sidecars.append(sidecar)
    for file in STAGE_FILES.get(stage.name, []):
        sparse(folder / file, BYTES)
    asked = {
        "schema": SCHEMA,
        "fingerprint": stage.fingerprint,
        "fields": stage.shown,
        "lineage": stage.lineage,
    }
    stage.folder.write(STAGE, json_bytes(asked))
    return complete(stage, ShardTable.of(sidecars), STAGE_FILES.get(stage.name, []), above, 1.0)


def write_workflow(root: Path, num_shards: int) -> Path:
    """The workflow's configuration file."""
    values = {
        "root": root,
        "last_stage": "prompt_features",
        "trainings.train.model.conditioning": "text_embed",
        "source.shard_size": SHARD_SIZE,
        "source.num_samples": num_shards * SHARD_SIZE,
    }
    demo = Path(__file__).parents[1] / "pipelines" / "configs" / "demo.yaml"
    config: WorkflowConfig = load_config(
        WorkflowConfig, demo, [f"{key}={value}" for key, value in values.items()]
    )
    root.mkdir(parents=True)
    above: dict[str, StageOutput] = {}
    for stage in data_stages(config):
        above[stage.name] = simulate(stage, above)
    path = root / "workflow.yaml"
    path.write_text(to_yaml(config))
    return path


def measure(command: str, config: Path) -> dict[str, float]:
    """Seconds and peak memory of one command, from the start of its process to its end."""
    before = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", command, str(config)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - before
    if process.returncode or "stale" in output or "partial" in output or "missing" in output:
        raise SystemExit(f"{command}: exit {process.returncode}\n{output}")
    return {"seconds": round(seconds, 2), "peak_mib": round(usage.ru_maxrss / 1024, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-shards", type=int, default=100_000)
    parser.add_argument("--root", type=Path, help="keep the simulated workflow here for the next time")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch) / "run"
        config = root / "workflow.yaml"
        if not config.is_file():
            # in a process of its own: a child's peak memory counts what its parent held when it was started
            simulation = get_context("spawn").Process(target=write_workflow, args=(root, args.num_shards))
            simulation.start()
            simulation.join()
        result: dict[str, object] = {"num_shards": args.num_shards}
        for command in ("status", "plan", "run"):
            result[command] = [measure(command, config) for _ in range(args.rounds)]
    print(json.dumps(result | {"target": {"seconds": TARGET_SEC, "peak_mib": TARGET_BYTES >> 20}}))


if __name__ == "__main__":
    main()
