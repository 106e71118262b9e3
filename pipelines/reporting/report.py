"""The files of a workflow -> one self-contained HTML page: data, training, scores, galleries, lineage."""

import json
import shutil
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from typing import Any

from pipelines.reporting import scores
from pipelines.reporting.charts import ENLARGE, INK, STYLE, Line, chart
from pipelines.shards.manifest import Manifest, read_output
from pipelines.shards.storage import Folder
from repfusion.display.tables import html
from repfusion.evaluation.record import GALLERY, Evaluation, read_evaluation
from repfusion.files import atomic_path, write_text
from repfusion.runs.folder import COMPLETE, CONFIG, STEP_FOLDER
from repfusion.tracking import metric_history


@dataclass(frozen=True)
class Finished:
    """What the page is made of; everything but the manifests may be missing."""

    root: Path
    trained: Path
    """Folder of the training that was evaluated."""
    manifests: list[Manifest]
    """Upstream first."""
    training: dict[str, Any]
    """What train.json says; empty before the first training ends."""
    losses: list[tuple[int, float]]
    evaluations: list[tuple[Path, Evaluation]]
    """Folder and scores, by step."""


def read_workflow(
    root: Path, data: Folder | None = None, name: str = "train", tracking_uri: str | None = None
) -> Finished:
    """`data` is where the data stages lie; None is under `root` too. `name` is of the training that was
    evaluated, `tracking_uri` where its run is: what lies in `root` names no address that anybody logs in to.

    Raises:
        ValueError: where no stage of a workflow is complete.
    """
    places = [Folder.at(root), *([] if data is None else [data])]
    outputs = [read_output(place / name) for place in places for name in sorted(place.folders())]
    # what was set aside, train.stale-..., is of no workflow any more
    found = {
        output.manifest.stage: output.manifest
        for output in outputs
        if output is not None and output.folder.name == output.manifest.stage
    }
    if not found:
        raise ValueError(f"{root}: no complete stage (no */manifest.json); run the workflow first")
    order = TopologicalSorter({name: sorted(found[name].upstream) for name in sorted(found)}).static_order()
    train_json = root / name / "train.json"
    training = json.loads(train_json.read_text()) if train_json.is_file() else {}
    losses: list[tuple[int, float]] = []
    if tracking_uri and training.get("run_id"):
        losses = metric_history(tracking_uri, training["run_id"], "train/loss")
    folders = [path for path in (root / "evaluate").glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    evaluations = [
        (folder, one) for folder in sorted(folders) if (one := read_evaluation(folder)) is not None
    ]
    manifests = [found[stage] for stage in order if stage in found]
    return Finished(root, root / name, manifests, training, losses, evaluations)


def short(digest: str) -> str:
    """The first twelve characters, the rest on hovering."""
    return f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def headline(data: Finished) -> str:
    """The few numbers a reader looks for first."""
    facts: list[tuple[str, str]] = []
    curated = next((m for m in data.manifests if m.stage == "curate"), None)
    if curated:
        facts.append((f"{curated.samples:,}", "curated samples"))
    if data.training:
        facts.append((f"{data.training['steps']:,}", "training steps"))
        facts.append((f"{data.training['samples_per_sec']:.0f}", "training samples/s"))
    facts += scores.facts(data.evaluations)
    total = sum(manifest.seconds for manifest in data.manifests)
    facts.append((duration(total), "in all stages"))
    return (
        '<div class="facts">' + "".join(f"<div><b>{v}</b><span>{t}</span></div>" for v, t in facts) + "</div>"
    )


def stages(data: Finished) -> str:
    rows = []
    for manifest in data.manifests:
        dropped = ", ".join(f"{escape(reason)} {count:,}" for reason, count in manifest.drops.items())
        rows.append(
            (
                f"<b>{escape(manifest.stage)}</b>",
                duration(manifest.seconds),
                f"{manifest.num_shards:,}" if manifest.num_shards else "",
                f"{manifest.samples:,}" if manifest.num_shards else "",
                size(manifest.bytes) if manifest.num_shards else "",
                f"{sum(manifest.drops.values()):,}" if manifest.num_shards else "",
                f'<span class="left">{dropped}</span>',
            )
        )
    head = ("stage", "time", "shards", "samples", "size", "dropped", '<span class="left">reasons</span>')
    return "<h2>Data and stages</h2>" + html(head, rows)


def training(data: Finished) -> str:
    if not data.training:
        return ""
    facts = data.training
    text = (
        f"{facts['steps']:,} steps on {facts['world_size']} workers, "
        f"{facts['samples_per_sec']:.0f} samples/s, "
        f"{duration(facts['train_sec'])}; loss over the last steps {facts['final_loss']:.4f}."
    )
    if not data.losses:
        return f"<h2>Training</h2><p>{text} The run was not tracked, so there is no curve.</p>"
    line = Line("loss", [(float(step), loss) for step, loss in data.losses], INK)
    return f"<h2>Training</h2><p>{text}</p>" + chart(
        [line], 880, 240, "step", "velocity loss, mean squared error"
    )


def lineage(data: Finished) -> str:
    """The way from the last checkpoint back to the weights and the data it came from."""
    rows: list[tuple[str, str]] = []
    train_config = data.trained / CONFIG
    checkpoint = Path(data.training["checkpoint"]) if data.training.get("checkpoint") else None
    if checkpoint is not None and (checkpoint / COMPLETE).is_file():
        rows.append(("checkpoint", f"<code>{escape(str(checkpoint))}</code>"))
        for part, digest in json.loads((checkpoint / CONFIG).read_text())["digests"].items():
            rows.append((f"{escape(part)} weights", short(digest)))
    if train_config.is_file():
        base = json.loads(train_config.read_text()).get("init_from")
        rows.append(("started from", f"<code>{escape(str(base))}</code>" if base else "scratch"))
    if data.training.get("run_id"):
        uri, run = escape(str(data.training["tracking_uri"])), escape(data.training["run_id"])
        rows.append(("MLflow run", f"<code>{run}</code> in <code>{uri}</code>"))
    rows += [(f"data of {escape(m.stage)}", short(m.digest)) for m in data.manifests]
    fields = [
        (escape(m.stage), f"<code>{escape(name)}</code>", f"<code>{escape(json.dumps(value))}</code>")
        for m in data.manifests
        for name, value in m.fields.items()
    ]
    decided = html(("stage", "field", "value"), fields, numeric_from=3)
    return (
        "<h2>Lineage</h2>"
        + html(("what", "which"), rows, numeric_from=2)
        + f"<details><summary>everything that decided the data</summary>{decided}</details>"
    )


def write_report(
    root: Path, data: Folder | None = None, name: str = "train", tracking_uri: str | None = None
) -> Path:
    """Writes `report.html` and, from the last checkpoint, `gallery.png` under `root`; returns the page.
    The arguments are `read_workflow`'s.

    Raises:
        ValueError: where no stage is complete.
    """
    found = read_workflow(root, data, name, tracking_uri)
    if found.evaluations:
        with atomic_path(root / GALLERY) as temporary:
            shutil.copyfile(found.evaluations[-1][0] / GALLERY, temporary)
    evaluated = scores.galleries(found.evaluations) + scores.scores(found.evaluations)
    body = headline(found) + evaluated + "".join(part(found) for part in (training, stages, lineage))
    title = escape(root.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: RepFusion</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main><script>{ENLARGE}</script></body></html>\n"
    )
    path = root / "report.html"
    write_text(path, page)
    return path
