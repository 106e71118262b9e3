"""What keeps two runs out of each other's way: a lock for each place that is written, however it is spelled.

ROOT/.lock              whoever is at work in a root, alone
DATA/.STAGE.lock        beside the folder of a data stage on local disk: who makes its shards, alone; who
                        reads them, shared; the kernel's, which frees it with its process
DATA/.STAGE.7.lock      the same on local disk and behind a URL, of who makes shards, on whatever machine: it
                        is renewed while its holder lives (lease.py). Reading needs none behind a URL:
                        training reads copies of its own, which are compared with their sha256
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Self

from pipelines.dag import ShardStage, Stage
from pipelines.shards.lease import Lease
from pipelines.shards.storage import Folder
from repfusion.locks import locked

LOCK = ".lock"
"""Held by whoever is at work in a root."""


@contextmanager
def locked_roots(*roots: Path) -> Iterator[None]:
    """Keeps a second run out of the same roots.

    Raises:
        ValueError: another run holds one of them.
    """
    with ExitStack() as held:
        for root in sorted({root.resolve() for root in roots}):
            held.enter_context(locked(root / LOCK, "give root=another/folder"))
        yield


@contextmanager
def stage_lock(folder: Folder) -> Iterator[None]:
    """Keeps others from writing and reading a data stage's folder."""
    with kernel_lock(folder), Lease(folder):
        yield


def kernel_lock(folder: Folder, is_shared: bool = False) -> AbstractContextManager[None]:
    """Keeps others of this machine from writing a data stage's folder, and, unless it is shared, from reading
    it. Behind a URL it does nothing.
    """
    if not folder.is_local:
        return nullcontext()
    remedy = "end it, and its lock goes with it, or give another data_url"
    return locked(lock_file(folder), remedy, is_shared, place=Path(folder.identity))


def lock_file(folder: Folder) -> Path:
    place = Path(folder.identity)
    return place.with_name(f".{place.name}.lock")


class DataLocks:
    """The data stages of a run or several, for the length of a block: held for nothing at first.

    A stage is made by one run alone, and read by any number.

    Args:
        stages: of which those that are made of shards count.
    """

    def __init__(self, stages: Iterable[Stage]):
        self.stages = {stage.folder.identity: stage for stage in stages if isinstance(stage, ShardStage)}
        self.written: frozenset[str] = frozenset()
        """Names of the stages that are held alone."""
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> bool | None:
        return self._held.__exit__(*exception)  # pyright: ignore[reportArgumentType]

    def read(self) -> None:
        """Lets others read too, and nobody write. Raises ValueError where somebody writes."""
        self.write(())

    def write(self, names: Iterable[str] | None = None) -> None:
        """Keeps everybody else from the stages of these names (None: from all), and others from writing any.
        Raises ValueError where somebody is at work.
        """
        every = {stage.name for stage in self.stages.values()}
        wanted = frozenset(every if names is None else every & {*names})
        self._held.close()
        self.written = frozenset()
        stages = [self.stages[identity] for identity in sorted(self.stages)]
        for stage in stages:
            self._held.enter_context(kernel_lock(stage.folder, is_shared=stage.name not in wanted))
        leases = [Lease(stage.folder) for stage in stages if stage.name in wanted]
        for lease in leases:
            lease.look()
        for lease in leases:
            self._held.enter_context(lease)
        self.written = wanted
