"""Garbage: what lies under workflows' roots that none of them refers to. Listed first, deleted when asked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.dag import ShardStage, Stage
from pipelines.shards.manifest import MANIFEST, SHARDS, read_output
from pipelines.shards.storage import Folder
from pipelines.workflow.inspection import STAGE, read_asked
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

    def __str__(self) -> str:
        place = self.folder if self.name is None else self.folder / self.name
        return f"{place}  {self.bytes:,} bytes  ({self.why})"

    def delete(self) -> None:
        if self.name is None:
            self.folder.clear()
        else:
            self.folder.remove(self.name)


def tree_bytes(folder: Folder) -> int:
    """Bytes of all files below a folder."""
    return sum(folder.sizes().values()) + sum(tree_bytes(folder / name) for name in folder.folders())


def _identity(folder: Folder) -> str:
    """A place's one spelling, however two workflows spell it: one's data must not be garbage to the other."""
    return str(folder.path.resolve()) if folder.is_local else folder.url.rstrip("/")


def find_garbage(workflows: Iterable[Sequence[Stage]], roots: Iterable[Path]) -> list[Garbage]:
    """Compares what lies under the roots and the stages' parents with what the workflows' stages hold.

    Only folders that a stage once wrote (they hold a stage.json) or set aside are looked at; anything else is
    not ours. What is stale stays: the next run replaces it.
    """
    stages = {_identity(stage.folder): stage for workflow in workflows for stage in workflow}
    places = {_identity(Folder.at(root)): Folder.at(root) for root in roots}
    for stage in stages.values():
        parent = Folder(stage.folder.url.rpartition("/")[0], stage.folder.options)
        places.setdefault(_identity(parent), parent)
    found: list[Garbage] = []
    for place in places.values():
        for name in sorted(place.folders()):
            folder = place / name
            stage = stages.get(_identity(folder))
            if stage is None and read_asked(folder) is not None:
                why = "set aside" if ".stale-" in name else "no workflow given has this stage"
                found.append(Garbage(folder, None, why, tree_bytes(folder)))
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
