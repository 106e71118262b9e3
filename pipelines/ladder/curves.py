"""Results -> SVG files: score against training step, and against the compute of an image."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.ladder.results import ComputePoint, Selection
from pipelines.reporting.charts import Line, chart
from repfusion.files import write_text

COLOURS = ("#1f2a44", "#c8553d", "#3a7d44", "#8e6c8a", "#d9a441", "#4a90a4", "#7f7f7f")
WIDTH, HEIGHT = 900, 320
START = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="11.5" '


def write_charts(selection: Selection, points: Sequence[ComputePoint], folder: Path) -> list[str]:
    """Names of the files written; a chart without points, or of a ladder of which one row has run, is removed
    where it lies.
    """
    rows_of = {name: [step.row for step in steps] for name, steps in selection.plan.ladders.items()}
    charts = {
        f"{name.lower().replace(' ', '_')}.svg": _against_step(selection, rows, name)
        for name, rows in {**rows_of, **selection.plan.charts}.items()
    }
    charts["compute.svg"] = _against_compute(points, selection.plan.rows)
    for name, svg in charts.items():
        if svg:
            write_text(folder / name, svg.replace("<svg ", START, 1) + "\n")
        else:
            (folder / name).unlink(missing_ok=True)
    return [name for name, svg in charts.items() if svg]


def _lines(curves: dict[str, dict[float, list[float]]]) -> list[Line]:
    """Means over seeds."""
    return [
        Line(name, [(x, sum(ys) / len(ys)) for x, ys in sorted(curve.items())], COLOURS[i % len(COLOURS)])
        for i, (name, curve) in enumerate(curves.items())
    ]


def _against_step(selection: Selection, rows: Sequence[str], title: str) -> str:
    found = selection.rows
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        curve: dict[float, list[float]] = defaultdict(list)
        for result in found.get(row, []):
            for point in result.points:
                curve[point.step].append(point.score)
        if curve:
            curves[row] = curve
    return chart(_lines(curves), WIDTH, HEIGHT, "training step", title) if len(curves) > 1 else ""


def _against_compute(points: Sequence[ComputePoint], rows: Iterable[str]) -> str:
    """Means over seeds at each number of steps; the x axis is the FLOPs of an image."""
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        curve: dict[float, list[float]] = defaultdict(list)
        for point in points:
            if point.row == row and point.score is not None and point.flops_per_image:
                curve[point.flops_per_image / 1e9].append(point.score)
        if curve:
            curves[row] = curve
    return chart(_lines(curves), WIDTH, HEIGHT, "GFLOPs an image", "Test-time compute", x_log=True)
