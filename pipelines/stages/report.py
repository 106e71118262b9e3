"""The report stage: the summary and the self-contained page of a workflow, which its MLflow run holds too."""

import json
import time
from pathlib import Path
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.reporting.report import read_workflow, write_report
from pipelines.shards.manifest import Upstream
from pipelines.shards.storage import Folder
from pipelines.workflow.summary import write_summary
from repfusion.display.redaction import redact_text
from repfusion.evaluation.shown import by_part
from repfusion.runs.folder import RunFolder
from repfusion.tracking import StoreError, Tracker, TrackingConfig


def report_stage(
    training: str, tracking: TrackingConfig, evaluate: Stage, started: float, place: Place
) -> WholeStage:
    """The stage `report` of the evaluated training of a name, whose run is where `tracking` says; the
    workflow's run began at `started` (perf_counter).
    """

    def execute(above: Upstream) -> dict[str, Any]:
        # the page shows the summary; its own seconds are added when the run ends
        manifests = {name: output.manifest for name, output in above.items()}
        write_summary(place.root, manifests, training, time.perf_counter() - started)
        page = write_report(place.root, place.data, training, tracking.uri)
        track_report(page, place.root / training, tracking)
        return {}

    outputs = (place.root / "report.html", place.root / "gallery.png")
    folder = Folder(str(place.root / "report"))
    return WholeStage("report", {}, folder, (evaluate,), execute, outputs, needs_ray=False)


def track_report(page: Path, training: Path, tracking: TrackingConfig) -> None:
    """The page as an artifact of the training's run, and its scores as the run's description. A store that is
    away is said, and costs no more: the page is on disk.
    """
    summary = RunFolder(training).summary
    run_id = json.loads(summary.read_text()).get("run_id") if summary.is_file() else None
    if tracking.uri is None or run_id is None:
        return
    try:
        tracker = Tracker(tracking.model_copy(update={"run_id": run_id}), attach=True)
        tracker.log_artifact(page)
        tracker.describe(description(page.parent))
    except StoreError as error:
        print(f"report: not in MLflow ({redact_text(str(error))}); it is {page}")


def description(root: Path) -> str:
    """Markdown: the scores of a workflow's checkpoints, the last one first."""
    evaluations = read_workflow(root).evaluations
    lines = [f"- step {one.step}: {by_part(one)}" for _, one in reversed(evaluations)]
    return "\n".join(["**Scores** (`report.html` among the artifacts shows them)", "", *lines])
