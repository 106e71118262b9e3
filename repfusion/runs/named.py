"""A workflow's root, a training, a checkpoint or an export, as somebody names it -> the folder to load."""

import logging
from pathlib import Path

from repfusion.runs.completion import latest_whole
from repfusion.runs.exported import is_export
from repfusion.runs.folder import BEST, COMPLETE, PINS, STEP_FOLDER, RunFolder, complete_checkpoints

log = logging.getLogger(__name__)


def named_model(path: str | Path) -> Path:
    """The export or checkpoint that a path names. A training stands for the checkpoint with the best score,
    or the last whole one where none was scored; a workflow's root for that of its scored training.

    Raises:
        ValueError: a folder that is none of these, without a checkpoint, or with trainings none of which was
            scored; all of its checkpoints are damaged.
    """
    path = Path(path)
    if not path.is_dir() or is_export(path) or (path / COMPLETE).exists() or STEP_FOLDER.fullmatch(path.name):
        return path  # whether it is whole is said where it is loaded
    found = path / "checkpoints" if path.name != "checkpoints" else path
    roots = [found] if found.is_dir() else trainings_below(path)
    if not roots:
        raise ValueError(
            f"{path}: neither a checkpoint or export, nor a training (checkpoints/), nor a workflow's root; "
            "expected one of them"
        )
    best = [
        folder for root in roots for folder in complete_checkpoints(root) if (folder / PINS / BEST).is_file()
    ]
    if len(best) == 1:
        return best[0]
    if len(roots) > 1:
        names = ", ".join(str(root.parent) for root in roots)
        raise ValueError(
            f"{path} holds {len(roots)} trainings, {len(best)} of them scored; name one: {names}"
        )
    last = latest_whole(roots[0])
    if last is None:
        raise ValueError(f"{roots[0]} holds no complete checkpoint; train on, or choose another")
    log.info("%s: no checkpoint of it was scored; taken is the last, %s", path, last.name)
    return last


def trainings_below(root: Path) -> list[Path]:
    """The folders of checkpoints of a workflow's trainings; those that were set aside are left out."""
    return [
        RunFolder(folder).checkpoints
        for folder in sorted(root.iterdir())
        if "." not in folder.name and RunFolder(folder).checkpoints.is_dir()
    ]
