"""The checkpoints of a training -> the last that it can go on from, the same on every rank.

Every file is compared with its sha256 before anything is read from it, each by one rank: the files are dealt
out by size, so that N ranks take about an N-th of the time of one.
"""

import logging
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from repfusion.runs.completion import read_complete, refuse, select
from repfusion.runs.folder import COMPLETE, LOOP, RESUME, checkpoint_folders, set_aside
from repfusion.runs.seals import Seals, damage
from repfusion.training.distributed import broadcast_object, failures, gather_objects

log = logging.getLogger(__name__)
Warn = Callable[[str], None]


def choose(root: Path, warn: Warn = log.warning) -> Path | None:
    """The last checkpoint under `root` that the training can resume from; None where there are none at all.
    Called by all ranks.

    Each later one that is damaged is renamed to NAME.damaged, and `warn` is told on rank 0 which file of it
    was why: the training will write that step again.

    Raises:
        ValueError: on every rank; there are checkpoints, and none can be resumed from.
    """
    problems: dict[Path, str] = {}
    for folder in broadcast_object(list(reversed(checkpoint_folders(root)))):
        if problem := _why_not(folder):
            problems[folder] = problem
            continue
        if dist.get_rank() == 0:
            for bad, why in problems.items():
                warn(f"{bad}: {why}. {_keep(bad)}; the training goes on from {folder.name}")
        dist.barrier()
        return folder
    if problems:
        listed = "; ".join(f"{folder.name}: {why}" for folder, why in problems.items())
        raise ValueError(
            f"{root}: there are checkpoints, and none that the training can go on from: {listed}. Copy one "
            "again from where it is whole; or start in a new output_dir, with init_from=CHECKPOINT to keep "
            "averaged weights that are whole; or move these away to begin anew"
        )
    return None


def _keep(folder: Path) -> str:
    try:
        return f"It is kept as {set_aside(folder, 'damaged').name}"
    except OSError as error:
        return f"It could not be renamed ({error})"


def check_together(folder: Path, wanted: Callable[[Container[str]], Iterable[str]]) -> None:
    """Compares the files that are `wanted` of a checkpoint's with what was written. Called by all ranks.

    Raises:
        ValueError: on every rank, where one of them found a file damaged, or does not see the checkpoint.
    """
    info = _read(folder)
    if isinstance(info, str):
        raise ValueError(info)
    refuse(folder, _damage_found(folder, select(folder, info["files"], wanted(info["files"]))))


def _why_not(folder: Path) -> str | None:
    """Why the training cannot resume from a checkpoint, the same on every rank; None where it can."""
    info = _read(folder)
    if isinstance(info, str):
        return info
    files: Seals = info["files"]
    if f"{RESUME}/{LOOP}" not in files:
        return "was written without the state that resuming needs"
    if not broadcast_object((folder / RESUME).is_dir()):
        return f"{RESUME}/ was removed"
    return _damage_found(folder, files)


def _read(folder: Path) -> dict[str, Any] | str:
    """Rank 0's reading of complete.json, or why it is not to be read. ValueError where a rank does not see
    what rank 0 sees.
    """
    info: dict[str, Any] | str = ""
    if dist.get_rank() == 0:
        try:
            info = read_complete(folder)
        except ValueError as error:
            info = str(error)
    info = broadcast_object(info)
    if not isinstance(info, str):
        here = (folder / COMPLETE).is_file()
        if blind := failures(None if here else FileNotFoundError(f"{folder / COMPLETE} is not here")):
            rank, text = min(blind.items())
            raise ValueError(f"rank {rank}: {text}; the folder has to be one that all ranks see")
    return info


def _damage_found(folder: Path, files: Seals) -> str | None:
    """The first problem that any rank finds in its share of the files."""
    share = share_of(files, dist.get_rank(), dist.get_world_size())
    own = damage(folder, {name: files[name] for name in share})
    return next((problem for problem in gather_objects(own) if problem is not None), None)


def share_of(files: Seals, rank: int, world_size: int) -> list[str]:
    """The files that a rank compares: the largest first, each to the rank that has least to read so far."""
    loads = [0] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        loads[least] += files[name].bytes
        shares[least].append(name)
    return shares[rank]
