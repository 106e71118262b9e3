"""A working folder -> a checkpoint, whole or absent; a checkpoint -> whether it still is what was written.

`complete.json`, written last, holds size and sha256 of every file, those of `resume/` too: its own sha256
names the checkpoint.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from repfusion.files import replace_folder
from repfusion.runs.folder import (
    COMPLETE,
    RESUME,
    STEP_FOLDER,
    checkpoint_folders,
    step_of,
    working_folder,
)
from repfusion.runs.seals import Seal, damage, files_below, read_seals, seal, write_seals

log = logging.getLogger(__name__)
SCHEMA = 3


def begin_checkpoint(folder: Path) -> Path:
    """An empty working folder beside `folder`, which takes its name in `finish_checkpoint`."""
    working = working_folder(folder)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    return working


def finish_checkpoint(
    working: Path, folder: Path, info: Mapping[str, Any], seals: Mapping[str, Seal] | None = None
) -> None:
    """Writes `complete.json`, brings all to the disk, then gives the folder its name.

    Args:
        working: what `begin_checkpoint` made.
        folder: the checkpoint's name.
        info: further fields of `complete.json`.
        seals: of every file, from the processes that wrote them; None takes them here.

    Raises:
        FileNotFoundError: a sealed file is not here.
    """
    seals = seal(working, files_below(working)) if seals is None else seals
    if absent := sorted(seals.keys() - set(files_below(working))):
        raise FileNotFoundError(f"{working / absent[0]}: written elsewhere; all ranks have to see one folder")
    write_seals(working / COMPLETE, SCHEMA, info, seals)
    replace_folder(working, folder)


def read_complete(folder: Path) -> dict[str, Any]:
    """What `complete.json` says, `files` as seals by name; the files themselves are not looked at.

    Raises:
        ValueError: the checkpoint is missing, was cut short, or its `complete.json` is damaged.
    """
    path = folder / COMPLETE
    if not path.exists():
        what = f"has no {COMPLETE}: it was cut short" if folder.is_dir() else "does not exist"
        raise ValueError(f"checkpoint {folder} {what}; choose another checkpoint")
    info = read_seals(path, SCHEMA, f"checkpoint {folder}")
    if STEP_FOLDER.fullmatch(folder.name) and info.get("step", step_of(folder)) != step_of(folder):
        raise ValueError(
            f"checkpoint {folder}: {COMPLETE} is of step {info['step']}: another checkpoint's, or damaged; "
            "copy it again"
        )
    return info


def check_complete(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """What `complete.json` says, after files were compared with it byte for byte.

    Args:
        folder: the checkpoint.
        names: the files that are going to be used; None is all that are there to generate from, without
            those that resuming alone needs.

    Raises:
        ValueError: the checkpoint is missing, was cut short, or a file is not what was written.
    """
    info = read_complete(folder)
    files = info["files"]
    wanted = [name for name in files if not is_for_resuming(name)] if names is None else names
    refuse(folder, damage(folder, select(folder, files, wanted)))
    return info


def select(folder: Path, files: Mapping[str, Seal], names: Iterable[str]) -> dict[str, Seal]:
    """The seals of files that are going to be used. ValueError where a checkpoint has none of that name."""
    chosen = {name: files.get(name) for name in names}
    if absent := [name for name, one in chosen.items() if one is None]:
        raise ValueError(
            f"checkpoint {folder} was written without {absent[0]}; it holds {', '.join(files)}: "
            "choose another checkpoint"
        )
    return {name: one for name, one in chosen.items() if one is not None}


def refuse(folder: Path, problem: str | None) -> None:
    """Raises ValueError where there is a problem with a file."""
    if problem is not None:
        raise ValueError(f"checkpoint {folder}: {problem}; copy it again, or choose another checkpoint")


def check_all(folder: Path) -> dict[str, Any]:
    """`check_complete` of every file that is there; what resuming needs may have been pruned."""
    files = read_complete(folder)["files"]
    return check_complete(folder, files if (folder / RESUME).is_dir() else None)


def is_for_resuming(name: str) -> bool:
    return name.startswith(f"{RESUME}/")


def latest_whole(root: Path) -> Path | None:
    """The last checkpoint to start or draw from whose files are what was written; a warning names each
    later one that is damaged. None where there are no checkpoints at all.

    Raises:
        ValueError: all of them are damaged.
    """
    problems: list[str] = []
    for folder in reversed(checkpoint_folders(root)):
        try:
            check_complete(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s. %s is taken instead", problem, folder.name)
        return folder
    if problems:
        raise ValueError(f"{root}: no checkpoint is whole. {'. '.join(problems)}")
    return None
