"""The report stage: the summary and the self-contained page of a workflow."""

import time
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.reporting.report import write_report
from pipelines.shards.manifest import Upstream
from pipelines.shards.storage import Folder
from pipelines.workflow.summary import write_summary


def report_stage(
    training: str, tracking_uri: str | None, evaluate: Stage, started: float, place: Place
) -> WholeStage:
    """The stage `report` of the evaluated training of a name, whose run is at `tracking_uri`; the run began
    at `started` (perf_counter).
    """

    def execute(above: Upstream) -> dict[str, Any]:
        # the page shows the summary; its own seconds are added when the run ends
        manifests = {name: output.manifest for name, output in above.items()}
        write_summary(place.root, manifests, training, time.perf_counter() - started)
        write_report(place.root, place.data, training, tracking_uri)
        return {}

    outputs = (place.root / "report.html", place.root / "gallery.png")
    folder = Folder(str(place.root / "report"))
    return WholeStage("report", {}, folder, (evaluate,), execute, outputs, needs_ray=False)
