"""What checkpoints and images were made from, written into them; `trace.py` follows it back.

A checkpoint and an export hold `lineage.json`; a PNG holds the text chunk `repfusion`.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from repfusion.data.columns import MANIFEST, manifest_digest
from repfusion.display.redaction import redact
from repfusion.files import file_sha256
from repfusion.images.decode import png_text
from repfusion.images.limits import BadImage
from repfusion.lineage.environment import git_commit, has_local_changes, lock_digest
from repfusion.runs.folder import COMPLETE, LINEAGE
from repfusion.weights import WEIGHTS, WEIGHTS_MARK, portable

CHUNK = "repfusion"
PLACES = {"path", "folder", "tracking_uri"}
"""Fields of records that name a place of this machine or network."""


@cache
def code_version() -> str | None:
    """The commit of this code, `-dirty` where tracked files differ from it; None where it lies in no
    checkout. Asked once a process: ask before the code can change.
    """
    commit = git_commit()
    return f"{commit}-dirty" if commit is not None and has_local_changes() else commit


def describe_column(folder: Path) -> dict[str, str | None]:
    """Where a column lies, which data its manifest names, and the fingerprint of the stage that wrote it."""
    manifest = folder / MANIFEST
    fingerprint = json.loads(manifest.read_bytes()).get("fingerprint") if manifest.is_file() else None
    return {
        "folder": str(folder.resolve()),
        "manifest_digest": manifest_digest(folder),
        "fingerprint": fingerprint,
    }


def lineage_record(
    *,
    step: int,
    datasets: Mapping[str, Mapping[str, Path]],
    digests: Mapping[str, str],
    run_id: str | None = None,
    tracking_uri: str | None = None,
    init_from: Path | None = None,
) -> dict[str, Any]:
    """What a checkpoint's lineage.json holds.

    Args:
        step: completed steps.
        datasets: folders of the columns that are read, by data set and column (`Mixture.folders`).
        digests: sha256 of the frozen weights (`checkpoint.frozen_digests`).
        run_id, tracking_uri: of the MLflow run; None where nothing is tracked.
        init_from: the checkpoint that the training started from; None where it started from scratch.
    """
    return {
        "run_id": run_id,
        "tracking_uri": tracking_uri,
        "git_commit": code_version(),
        "lock_digest": lock_digest(),
        "step": step,
        "init_from": None if init_from is None else checkpoint_record(init_from),
        "datasets": {
            name: {column: describe_column(Path(folder)) for column, folder in columns.items()}
            for name, columns in datasets.items()
        },
        "digests": dict(digests),
    }


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """lineage.json of a checkpoint or an export; None where it has none. ValueError where it is damaged."""
    path = folder / LINEAGE
    return _read_object(path.read_text(), str(path)) if path.is_file() else None


def _read_object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {type(found).__name__}, expected an object")
    return found


def folder_record(folder: Path, mark: str) -> dict[str, Any]:
    """A finished folder's place and name: the sha256 of the file that marks it complete. Shipped weights keep
    a place that means the same on every machine.
    """
    path = portable(str(folder.resolve()), str(WEIGHTS.resolve()), WEIGHTS_MARK)
    return {"path": path, "digest": file_sha256(folder / mark)}


def checkpoint_record(folder: Path) -> dict[str, Any]:
    """Path, digest and step of a checkpoint."""
    step = json.loads((folder / COMPLETE).read_text()).get("step")
    return {**folder_record(folder, COMPLETE), "step": step}


def without_places(record: Any) -> Any:
    """A record without folders of this machine (those of shipped weights mean the same on every one) and
    without the address at which the run is tracked: what may be shown to anybody.
    """
    match record:
        case dict():
            return {name: _kept(name, part) for name, part in record.items()}
        case list() | tuple():
            return [without_places(part) for part in record]
        case _:
            return record


def _kept(name: str, value: Any) -> Any:
    if name not in PLACES or not isinstance(value, str):
        return without_places(value)
    return value if value.startswith(WEIGHTS_MARK) else None


def png_info(record: Mapping[str, Any]) -> PngInfo:
    """The record as JSON in the text chunk `repfusion`, for `Image.save(path, pnginfo=...)`."""
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(redact(dict(record))))
    return info


def read_png(path: Path) -> dict[str, Any]:
    """The record that `png_info` wrote. ValueError where the file is no image of this format, holds none, or
    one that is no JSON object; text chunks are unpacked to a few MB at most.
    """
    try:
        text = png_text(path.read_bytes(), CHUNK)
    except (OSError, BadImage) as error:
        raise ValueError(f"{path}: not a readable image, expected a PNG file ({error})") from error
    if text is None:
        raise ValueError(
            f"{path}: no text chunk {CHUNK!r}; only PNG files written by repfusion.generate have one, "
            "and many programs drop it when they save an image anew"
        )
    return _read_object(text, f"{path}: its text chunk {CHUNK!r}")
