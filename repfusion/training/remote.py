"""The checkpoints of a training <-> their copies behind a URL, each rank with a share of the files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from repfusion.files import replace_folder
from repfusion.runs.completion import begin_checkpoint, read_complete
from repfusion.runs.folder import COMPLETE, RunFolder, checkpoint_folder, step_of, working_folder
from repfusion.runs.remote import RemoteRun
from repfusion.runs.seals import Seals, damage
from repfusion.training.choice import Warn, share_of
from repfusion.training.distributed import broadcast_object, failures, gather_objects
from repfusion.training.snapshot import CheckpointError

T = TypeVar("T")
Retention = tuple[int, int | None, int | None]
"""`keep_resume`, `keep_last` and `keep_every_steps` of a training."""


def upload(remote: RemoteRun, folder: Path) -> None:
    """Puts a local checkpoint behind the URL, whole or not at all, unless it is there. Called by all ranks.

    Raises:
        CheckpointError: on every rank, where the store refuses; the local checkpoint stays.
    """
    step, mark = step_of(folder), (folder / COMPLETE).read_bytes()
    try:
        if _on_first(lambda: remote.complete(step)) == mark:
            return
        _on_first(lambda: remote.begin(step))
        _by_shares(read_complete(folder)["files"], lambda names: remote.put(step, folder, names))
        _on_first(lambda: remote.put(step, folder, [COMPLETE]))
    except OSError as error:
        raise CheckpointError(f"{folder} is written, but not its copy: {error}") from error


def upload_notes(remote: RemoteRun, run: RunFolder) -> None:
    """Puts what the training says of itself beside its checkpoints. Called by all ranks. Raises
    CheckpointError on every rank where the store refuses.
    """
    try:
        _on_first(lambda: remote.put_notes(run))
    except OSError as error:
        raise CheckpointError(f"nothing can be kept: {error}") from error


def prune_remote(remote: RemoteRun, root: Path, retention: Retention) -> None:
    """Keeps behind the URL what `runs.checkpoint.prune` would keep. Called by all ranks. Raises
    CheckpointError on every rank where the store refuses.
    """
    try:
        _on_first(lambda: remote.prune(root, *retention))
    except OSError as error:
        raise CheckpointError(f"older checkpoints could not be removed: {error}") from error


def bring_newest(remote: RemoteRun, run: RunFolder, warn: Warn) -> None:
    """Downloads the last whole checkpoint behind the URL that can be resumed from, and the notes beside it,
    unless they are here. Called by all ranks, which see one folder.

    Each later one that is damaged there is renamed to NAME.damaged, and `warn` is told on rank 0.

    Raises:
        ValueError: on every rank; the store cannot be read, or there are checkpoints, and all are damaged.
    """
    problems: list[str] = []
    try:
        _on_first(lambda: remote.fetch_notes(run))
        for step in reversed(_on_first(lambda: remote.steps(resumable=True))):
            problem = _bring(remote, step, checkpoint_folder(run.checkpoints, step))
            if problem is None:
                return
            kept = _on_first(lambda step=step: remote.set_aside(step))
            problems.append(f"step {step}: {problem}")
            if dist.get_rank() == 0:
                warn(f"{remote.url}: step {step}: {problem}. It is kept as {kept}")
    except OSError as error:
        raise ValueError(f"the checkpoints could not be read: {error}") from error
    if problems:
        raise ValueError(
            f"{remote.url}: there are checkpoints, and none that the training can go on from: "
            f"{'; '.join(problems)}. Give another output_url, with init_from=CHECKPOINT to start from another"
        )


def _bring(remote: RemoteRun, step: int, folder: Path) -> str | None:
    """Makes the local folder the checkpoint that is behind the URL. What is wrong with that one, or None."""
    working = working_folder(folder)

    def begin() -> tuple[bytes, Seals | str]:
        """The checkpoint's `complete.json`, and the seals of its files or why there are none."""
        mark = remote.complete(step) or b""
        begin_checkpoint(folder)
        (working / COMPLETE).write_bytes(mark)
        try:
            return mark, read_complete(working)["files"]
        except ValueError as error:
            return mark, str(error)

    mark, seals = _on_first(begin)
    problem = seals if isinstance(seals, str) else None
    if not isinstance(seals, str) and not _is_here(folder, mark, seals):
        problem = _problem(seals, lambda part: _download(remote, step, working, part))
        if problem is None:
            _on_first(lambda: replace_folder(working, folder))
    _on_first(lambda: shutil.rmtree(working, ignore_errors=True))
    return problem


def _is_here(folder: Path, mark: bytes, seals: Seals) -> bool:
    """Whether every rank sees the checkpoint in the local folder, whole."""
    is_same = (folder / COMPLETE).is_file() and (folder / COMPLETE).read_bytes() == mark
    return all(gather_objects(is_same)) and _problem(seals, lambda part: damage(folder, part)) is None


def _download(remote: RemoteRun, step: int, working: Path, seals: Seals) -> str | None:
    """What is wrong with the first of the files that is not what its seal says; None where all are."""
    for name in seals:
        try:
            remote.fetch(step, working, name)
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return f"{name} is missing"
            raise
    return damage(working, seals)


def _problem(seals: Seals, look: Callable[[Seals], str | None]) -> str | None:
    """The first problem that any rank finds in its share of the files."""
    found = _by_shares(seals, lambda names: look({name: seals[name] for name in names}))
    return next((problem for problem in found if problem is not None), None)


def _on_first(act: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank. OSError on every rank where it could not."""
    return broadcast_object(_gather(act if dist.get_rank() == 0 else lambda: None)[0])


def _by_shares(seals: Seals, act: Callable[[list[str]], T]) -> list[T]:
    """What each rank makes of its share of the files, by rank. OSError on every rank where one could not."""
    share = share_of(seals, dist.get_rank(), dist.get_world_size())
    return _gather(lambda: act(share))


def _gather(act: Callable[[], Any]) -> list[Any]:
    value, error = None, None
    try:
        value = act()
    except OSError as caught:
        error = caught
    if found := failures(error):
        rank, text = min(found.items())
        raise OSError(f"rank {rank}: {text}") from error
    return gather_objects(value)
