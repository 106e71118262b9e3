"""Manifests of a workflow's stages -> summary.json: what ran, how long, what was dropped, how training and
evaluations went.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.shards.manifest import Manifest
from repfusion.files import write_json

STAGE_EXTRA = ("upstream_digests", "evaluations")


def summarise(manifests: Mapping[str, Manifest], training: str, total_sec: float) -> dict[str, Any]:
    """What the workflow holds. `training`, that of the stage of this name, and `evaluations` are there once
    those stages are; `seconds` of a stage are of the run that made it.
    """
    summary: dict[str, Any] = {
        "stages": [
            {
                "name": name,
                "seconds": manifest.seconds,
                "shards": manifest.num_shards,
                "samples": manifest.samples,
                "drops": manifest.drops,
                "fingerprint": manifest.fingerprint,
            }
            for name, manifest in manifests.items()
        ]
    }
    if train := manifests.get(training):
        summary["training"] = {name: value for name, value in train.extra.items() if name not in STAGE_EXTRA}
        summary["mlflow"] = {name: train.extra.get(name) for name in ("tracking_uri", "run_id")}
    if evaluate := manifests.get("evaluate"):
        summary["evaluations"] = evaluate.extra.get("evaluations", [])
    return {**summary, "total_sec": round(total_sec, 3)}


def write_summary(root: Path, manifests: Mapping[str, Manifest], training: str, total_sec: float) -> Path:
    path = root / "summary.json"
    write_json(path, summarise(manifests, training, total_sec))
    return path
