"""Garbage: what lies under workflows' roots that none of them refers to. Listed first, deleted when asked."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.dag import ShardStage, Stage
from pipelines.shards.manifest import MANIFEST, SHARDS, read_output
from pipelines.shards.storage import Folder
from pipelines.workflow.inspection import STAGE, STALE, is_training, read_asked
from pipelines.workflow.locks import lock_file, stage_lock
from pipelines.workflow.verify import QUARANTINE
from repfusion.files import TEMPORARY


@dataclass(frozen=True)
class Garbage:
    """A file, or a whole folder, that can go."""

    folder: Folder
    name: str | None
    """None is the folder itself."""
    why: str
    bytes: int
    is_stage: bool = False
    """Whether it is the whole folder of a stage."""
    is_training: bool = False

    @property
    def place(self) -> Folder:
        return self.folder if self.name is None else self.folder / self.name

    def __str__(self) -> str:
        return f"{self.place}  {self.bytes:,} bytes  ({self.why})"

    def delete(self) -> "Removed":
        """Removes what can be removed, and says what was and what was not."""
        try:
            problems = self._clear() if self.name is None else self.folder.remove(self.name) or []
        except (OSError, ValueError) as error:
            problems = [f"{self.place}: {error}"]
        left = tree_bytes(self.folder) if self.name is None else self.folder.sizes().get(self.name, 0)
        return Removed(self.bytes - left, problems)

    def _clear(self) -> list[str]:
        """Removes the folder unless somebody makes or reads it, of a workflow that was not given."""
        if not self.is_stage:
            return self.folder.clear()
        with stage_lock(self.folder):
            problems = self.folder.clear()
            if self.folder.is_local and not problems:
                lock_file(self.folder).unlink(missing_ok=True)
        return problems


@dataclass(frozen=True)
class Removed:
    """What became of something that was to be deleted."""

    bytes: int
    problems: list[str]
    """Each path that is still there, and why."""


def tree_bytes(folder: Folder) -> int:
    """Bytes of all files below a folder; of links their own."""
    if not folder.is_local:
        return sum(folder.sizes().values()) + sum(tree_bytes(folder / name) for name in folder.folders())
    paths = (Path(parent) / name for parent, _, names in os.walk(folder.path) for name in names)
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def find_garbage(workflows: Iterable[Sequence[Stage]], roots: Iterable[Path]) -> list[Garbage]:
    """Compares what lies under the roots and the stages' parents with what the workflows' stages hold.

    Only folders that a stage once wrote (they hold a stage.json) or set aside are looked at; anything else is
    not ours. What is stale stays: the next run replaces it.
    """
    stages = {stage.folder.identity: stage for workflow in workflows for stage in workflow}
    places = {Folder.at(root).identity: Folder.at(root) for root in roots}
    for stage in stages.values():
        places.setdefault(stage.folder.parent.identity, stage.folder.parent)
    found: list[Garbage] = []
    for place in places.values():
        for name in sorted(place.folders()):
            folder = place / name
            stage = stages.get(folder.identity)
            if stage is None and (asked := read_asked(folder)) is not None:
                why = "set aside" if f".{STALE}" in name else "no workflow given has this stage"
                found.append(Garbage(folder, None, why, tree_bytes(folder), True, is_training(asked)))
            elif isinstance(stage, ShardStage):
                found += _inside(folder)
    return found


def _inside(folder: Folder) -> list[Garbage]:
    """Quarantine, what a killed run left half-written, and files that no complete shard refers to."""
    found: list[Garbage] = []
    if QUARANTINE in folder.folders():
        inner = folder / QUARANTINE
        found.append(Garbage(inner, None, "quarantined by verify", tree_bytes(inner)))
    if folder.is_local:
        for path in sorted(folder.path.glob(f".*{TEMPORARY}")):
            if path.is_dir():
                inner = Folder(str(path))
                found.append(Garbage(inner, None, "half-written", tree_bytes(inner)))
            else:
                found.append(Garbage(folder, path.name, "half-written", path.stat().st_size))
    output = read_output(folder)
    if output is None:
        # a stage at work: its shards are known only when it is complete
        return found
    wanted = {STAGE, MANIFEST, SHARDS, *output.manifest.files}
    for shard in output.shards:
        wanted |= {f"{shard.name}.json", shard.file, *shard.files}
    for name, size in sorted(folder.sizes().items()):
        if name not in wanted:
            found.append(Garbage(folder, name, "no manifest lists it", size))
    return found
