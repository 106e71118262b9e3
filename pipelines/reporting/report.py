"""The files of a workflow -> one self-contained HTML page: data, training, scores, galleries, lineage."""

import base64
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from typing import Any

from pipelines.reporting.charts import INK, STYLE, Line, chart
from pipelines.shards.manifest import Manifest, read_output
from pipelines.shards.storage import Folder
from repfusion.evaluation import Evaluation, read_evaluation
from repfusion.files import atomic_path, write_text
from repfusion.runs.checkpoint import COMPLETE, STEP_FOLDER
from repfusion.scenes.captions import TASKS
from repfusion.tracking import metric_history

ACCENT, MUTED = "#b5532a", "#8a8a90"


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


def read_workflow(root: Path, data: Folder | None = None, name: str = "train") -> Finished:
    """`data` is where the data stages lie; None is under `root` too. `name` is of the training that was
    evaluated.

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
    if training.get("tracking_uri") and training.get("run_id"):
        losses = metric_history(training["tracking_uri"], training["run_id"], "train/loss")
    folders = [path for path in (root / "evaluate").glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    evaluations = [
        (folder, one) for folder in sorted(folders) if (one := read_evaluation(folder)) is not None
    ]
    manifests = [found[stage] for stage in order if stage in found]
    return Finished(root, root / name, manifests, training, losses, evaluations)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """Cells are HTML; columns from `numeric_from` on are set right."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ("" if i < numeric_from else ' class="n"' for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{s}>{c}</{tag}>" for c, s in zip(cells, sides, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def short(digest: str) -> str:
    """The first twelve characters, the rest on hovering."""
    return f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def percent(value: float | None) -> str:
    """A share with a bar behind it."""
    if value is None:
        return "&ndash;"
    return f'<span class="bar" style="--share:{value:.3f}">{100 * value:.0f}</span>'


def image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def headline(data: Finished) -> str:
    """The few numbers a reader looks for first."""
    facts: list[tuple[str, str]] = []
    curated = next((m for m in data.manifests if m.stage == "curate"), None)
    if curated:
        facts.append((f"{curated.samples:,}", "curated samples"))
    if data.training:
        facts.append((f"{data.training['steps']:,}", "training steps"))
        facts.append((f"{data.training['samples_per_sec']:.0f}", "training samples/s"))
    if data.evaluations:
        first, last = data.evaluations[0][1].scores, data.evaluations[-1][1].scores
        facts.append((f"{100 * last.overall:.0f}%", "prompts followed (mean over tasks)"))
        if last.new_concept is not None and first.new_concept is not None and len(data.evaluations) > 1:
            change = f"{100 * first.new_concept:.0f} &rarr; {100 * last.new_concept:.0f}%"
            facts.append((change, "prompts with the new shape or colour"))
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
    return "<h2>Data and stages</h2>" + table(head, rows)


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


def scores(data: Finished) -> str:
    if not data.evaluations:
        return ""
    all_scores = [(float(one.step or 0), one.scores) for _, one in data.evaluations]
    last = data.evaluations[-1][1]
    new = [(step, s.new_concept) for step, s in all_scores if s.new_concept is not None]
    main = [
        Line("overall", [(step, s.overall) for step, s in all_scores], INK),
        Line("new concept", new, ACCENT),
        Line("shuffled prompts", [(step, s.shuffled_overall) for step, s in all_scores], MUTED, dashed=True),
    ]
    small = "".join(
        chart(
            [Line("", [(step, s.per_task[task]) for step, s in all_scores if task in s.per_task], INK)],
            282,
            130,
            title=task.replace("_", " "),
            y_range=(0, 1),
        )
        for task in TASKS
    )
    head = ("step", "overall", *(task.replace("_", " ") for task in TASKS), "new concept", "shuffled")
    rows = [
        (
            f"{one.step if one.step is not None else '?'}",
            percent(one.scores.overall),
            *(percent(one.scores.per_task.get(task)) for task in TASKS),
            percent(one.scores.new_concept),
            percent(one.scores.shuffled_overall),
        )
        for _, one in data.evaluations
    ]
    sampler = last.config.sampler
    return (
        f"<h2>Scores</h2><p>Percent of {last.scores.num_prompts} held-out prompts that the image satisfies, "
        f"checked by an exact detector of shapes and colours; <i>overall</i> is the mean over the six tasks, "
        f"<i>shuffled</i> the same images against other prompts of the same task. "
        f"{sampler.num_steps} sampling steps, guidance {sampler.guidance_scale:g}. Step 0 is the checkpoint "
        "that training started from.</p>"
        + chart(main, 880, 240, "step", y_range=(0, 1))
        + f'<div class="small">{small}</div>'
        + table(head, rows)
    )


def galleries(data: Finished) -> str:
    if not data.evaluations:
        return ""
    parts = ["<h2>Images</h2><p>Drawn from held-out prompts; green frames are right, red ones wrong.</p>"]
    for position, (folder, one) in enumerate(reversed(data.evaluations)):
        picture = image(folder / "gallery.png", f"images of step {one.step}")
        opened = ' open=""' if position == 0 else ""
        parts.append(f"<details{opened}><summary>step {one.step}</summary>{picture}</details>")
    return "".join(parts)


def lineage(data: Finished) -> str:
    """From the last checkpoint back to the weights and the data it came from."""
    rows: list[tuple[str, str]] = []
    train_config = data.trained / "config.json"
    checkpoint = Path(data.training["checkpoint"]) if data.training.get("checkpoint") else None
    if checkpoint is not None and (checkpoint / COMPLETE).is_file():
        rows.append(("checkpoint", f"<code>{escape(str(checkpoint))}</code>"))
        for part, digest in json.loads((checkpoint / "config.json").read_text())["digests"].items():
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
    decided = table(("stage", "field", "value"), fields, numeric_from=3)
    return (
        "<h2>Lineage</h2>"
        + table(("what", "which"), rows, numeric_from=2)
        + f"<details><summary>everything that decided the data</summary>{decided}</details>"
    )


def write_report(root: Path, data: Folder | None = None, name: str = "train") -> Path:
    """Writes `report.html` and, from the last checkpoint, `gallery.png` under `root`; returns the page.
    The arguments are `read_workflow`'s.

    Raises:
        ValueError: where no stage is complete.
    """
    found = read_workflow(root, data, name)
    if found.evaluations:
        with atomic_path(root / "gallery.png") as temporary:
            shutil.copyfile(found.evaluations[-1][0] / "gallery.png", temporary)
    sections = (headline, galleries, scores, training, stages, lineage)
    body = "".join(section(found) for section in sections)
    title = escape(root.resolve().name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: RepFusion</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )
    path = root / "report.html"
    write_text(path, page)
    return path
