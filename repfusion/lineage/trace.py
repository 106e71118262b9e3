"""An image, a checkpoint or an export -> the links of its lineage, each compared with what lies on this
machine.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from repfusion.data.columns import manifest_digest
from repfusion.display.tables import aligned
from repfusion.files import file_sha256, weights_digest
from repfusion.lineage.describe import CHUNK, read_lineage, read_png
from repfusion.lineage.records import ExportRecord, ImageRecord, TrainingRecord, checked
from repfusion.runs.checkpoint import read_config
from repfusion.runs.completion import check_all
from repfusion.runs.exported import MARK, check_export
from repfusion.runs.folder import COMPLETE, CONFIG, LINEAGE, RunFolder
from repfusion.weights import WEIGHTS, WEIGHTS_MARK, portable

State = Literal["agrees", "differs", "missing", "elsewhere", "recorded", "unknown"]
"""`recorded`: nothing here to compare with; `elsewhere`: not on this machine, which an export may leave."""
BROKEN = ("differs", "missing")
SHORT = 12


@dataclass(frozen=True)
class Link:
    """One fact of a lineage, and whether this machine still agrees with it."""

    name: str
    value: str
    state: State = "recorded"
    note: str = ""


def here(path: str) -> Path:
    """A recorded path; shipped weights are found wherever this code lies."""
    return Path(portable(path, WEIGHTS_MARK, str(WEIGHTS)))


def short(digest: str | None) -> str:
    return "none" if digest is None else digest[:SHORT]


def trace(subject: Path) -> list[Link]:
    """The chain, nearest link first. Raises ValueError where `subject` is none of the three."""
    if (subject / MARK).is_file():
        return list(trace_export(subject))
    if (subject / CONFIG).is_file() or (subject / COMPLETE).is_file():
        return list(trace_checkpoint(subject))
    if subject.is_file():
        return list(trace_image(subject))
    what = "neither a checkpoint nor an export" if subject.is_dir() else "does not exist"
    raise ValueError(f"{subject}: {what}; expected IMAGE.png, a checkpoint folder or an export folder")


def trace_image(path: Path) -> Iterator[Link]:
    record = checked(ImageRecord, read_png(path), f"{path}: its text chunk {CHUNK!r}").model_dump()
    yield Link("image", str(path), "agrees", "carries its lineage")
    several = len(record["rows"]) > 1
    for number, row in enumerate(record["rows"], 1):
        of_row = f" {number}" if several else ""
        yield Link(f"prompt{of_row}", row["prompt"])
        yield Link(f"seed{of_row}", spell_seeds(row["seeds"]))
    yield how_it_came(record)
    if (exported := record.get("export")) is not None:
        link = marked_folder("export", exported, MARK, "missing")
        yield link
        if link.state == "agrees" and exported["path"] is not None:
            yield from trace_export(here(exported["path"]), is_subject=False)
            return
    saved = record["checkpoint"]
    link = marked_folder("checkpoint", saved, COMPLETE, "missing" if exported is None else "elsewhere")
    if link.state == "agrees" and saved["path"] is not None:
        yield from trace_checkpoint(here(saved["path"]), note=link.note)
        return
    yield link
    yield Link("step", str(saved["step"]))
    # What the image itself remembers of the checkpoint.
    yield from describe_training(record.get("lineage"), "missing" if exported is None else "elsewhere")


def how_it_came(record: Mapping[str, Any]) -> Link:
    """The sampler of an image that was drawn, or the sample of a data set that was retrieved in its place."""
    if (found := record["retrieved"]) is not None:
        where = f" in {found['folder']}" if found["folder"] is not None else ""
        said = f"{found['sample']} of {found['shard']}{where}, score {found['score']:.3f}"
        return Link("retrieved", said, "recorded", f"index {short(found['index'])}")
    low, high = record["guidance_interval"]
    where = "" if (low, high) == (0, 1) else f" at noise levels {low:g} to {high:g}"
    guided = f"guidance {record['guidance_scale']:g}{where}"
    return Link("sampler", f"{record['num_steps']} {record['solver']} steps, {guided}")


def spell_seeds(seeds: Sequence[int]) -> str:
    """`5 to 8` of seeds that follow each other, else all of them."""
    first, last = seeds[0], seeds[-1]
    if len(seeds) > 1 and list(seeds) == list(range(first, first + len(seeds))):
        return f"{first} to {last}"
    return ", ".join(map(str, seeds))


def marked_folder(name: str, saved: Mapping[str, Any], mark: str, absent: State) -> Link:
    """A recorded folder whose digest is that of its file `mark`."""
    expected = saved["digest"]
    if saved["path"] is None:
        return Link(name, "-", "recorded", f"digest {short(expected)}; its folder was left out")
    folder = here(saved["path"])
    if not os.path.isfile(folder / mark):  # False too where the system takes no such path
        return Link(name, str(folder), absent, f"no {mark} there; it was {short(expected)}")
    got = file_sha256(folder / mark)
    if got != expected:
        note = f"{mark} is {short(got)}, recorded {short(expected)}"
        return Link(name, str(folder), "differs", note)
    return Link(name, str(folder), "agrees", f"digest {short(got)}")


def trace_checkpoint(folder: Path, note: str = "complete") -> Iterator[Link]:
    step = None
    try:
        step = check_all(folder).get("step")
        yield Link("checkpoint", str(folder), "agrees", note)
    except ValueError as error:
        yield Link("checkpoint", str(folder), "differs", str(error))
    if step is not None:
        yield Link("step", str(step))
    lineage = read_lineage(folder)
    if lineage is None:
        yield from guess_training(folder)
    else:
        yield from describe_training(
            checked(TrainingRecord, lineage, str(folder / LINEAGE)).model_dump(), "missing"
        )
    if os.path.isfile(folder / CONFIG):
        config, digests = read_config(folder)
        yield Link("config", str(folder / CONFIG), "recorded", config.describe())
        folders = config.parts()
        yield from frozen_weights(digests, folders, "missing")


def trace_export(folder: Path, is_subject: bool = True) -> Iterator[Link]:
    """An export stands for itself: what it came from may be on another machine."""
    try:
        num_files = len(check_export(folder)["files"])
        if is_subject:
            yield Link("export", str(folder), "agrees", f"{num_files} files hold what they held")
    except ValueError as error:
        yield Link("export", str(folder), "differs", str(error))
    if (found := read_lineage(folder)) is None:
        return
    lineage = checked(ExportRecord, found, str(folder / LINEAGE)).model_dump()
    yield marked_folder("checkpoint", lineage["checkpoint"], COMPLETE, "elsewhere")
    yield Link("step", str(lineage["checkpoint"]["step"]), "recorded", f"{lineage['weights']} weights")
    yield from describe_training(lineage.get("training"), "elsewhere")
    folders = {part: here(path) for part, path in lineage["sources"].items()}
    yield from frozen_weights(lineage["digests"], folders, "elsewhere")


def describe_training(lineage: Mapping[str, Any] | None, absent: State) -> Iterator[Link]:
    """Run, code and data sets of a checkpoint's lineage.json."""
    if lineage is None:
        for name in ("run", "code", "data"):
            yield Link(name, "-", "unknown", "not recorded: the checkpoint has no lineage.json")
        return
    if lineage["run_id"] is None:
        yield Link("run", "-", "unknown", "the training was not tracked")
    else:
        place = lineage["tracking_uri"] or "an address that was left out"
        yield Link("run", lineage["run_id"], "recorded", f"MLflow at {place}")
    lock = short(lineage["lock_digest"])
    yield Link("code", lineage["git_commit"] or "-", "recorded", f"requirements.lock {lock}")
    if (parent := lineage.get("init_from")) is not None:
        yield marked_folder("init from", parent, COMPLETE, absent)
    for name, columns in lineage["datasets"].items():
        for column, saved in columns.items():
            yield data_link(f"data {name}/{column}", saved, absent)


def data_link(name: str, saved: Mapping[str, Any], absent: State) -> Link:
    """Whether a column's folder still holds the manifest it was trained on."""
    expected = saved["manifest_digest"]
    what = f"manifest {short(expected)}, fingerprint {short(saved['fingerprint'])}"
    if saved["folder"] is None:
        return Link(name, "-", "recorded", f"{what}; its folder was left out")
    folder = Path(saved["folder"])
    if not os.path.isdir(folder):
        return Link(name, str(folder), absent, f"no such folder; it held {what}")
    if expected is None:
        return Link(name, str(folder), "recorded", "had no manifest")
    got = manifest_digest(folder)
    if got != expected:
        return Link(name, str(folder), "differs", f"holds manifest {short(got)}, trained on {what}")
    return Link(name, str(folder), "agrees", what)


def guess_training(folder: Path) -> Iterator[Link]:
    """What lies around a checkpoint that has no lineage.json: the training's own notes."""
    output_dir = folder.resolve().parent.parent
    notes = RunFolder(output_dir).tracked, RunFolder(output_dir).config
    run, config = (json.loads(path.read_text()) if path.is_file() else None for path in notes)
    if run is None and config is None:
        yield from describe_training(None, "missing")
        return
    if run is not None:
        yield Link("run", run["run_id"], "recorded", f"MLflow at {run['uri']} (from {notes[0].name})")
    data = (config or {}).get("data") or {}
    for name, one in {"main": data, **data.get("mix", {})}.items():
        for column, folder in {"images": one.get("images"), **one.get("columns", {})}.items():
            if folder is not None:
                present = short(manifest_digest(Path(folder)))
                note = f"from {notes[1].name}; the digest was not recorded, now {present}"
                yield Link(f"data {name}/{column}", folder, "unknown", note)


def frozen_weights(digests: Mapping[str, str], folders: Mapping[str, Path], absent: State) -> Iterator[Link]:
    for part, expected in digests.items():
        if (folder := folders.get(part)) is None:
            yield Link(part, "-", "unknown", "no folder of these weights is recorded")
            continue
        if not any(folder.glob("*.safetensors")):
            yield Link(part, str(folder), absent, f"no weights there; they were {short(expected)}")
            continue
        got = weights_digest(folder)
        if got == expected:
            yield Link(part, str(folder), "agrees", f"weights {short(got)}")
        else:
            yield Link(part, str(folder), "differs", f"holds {short(got)}, trained with {short(expected)}")


def table(links: list[Link]) -> str:
    """Aligned plain text, a line a link."""
    rows = [(one.name, one.state, f"{one.value}  {one.note}".rstrip()) for one in links]
    return aligned(rows, left=(0, 1, 2))
