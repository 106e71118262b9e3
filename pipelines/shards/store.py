"""Shards and their sidecars: what a worker commits, whole or not at all, and what marks it complete last.

A shard is `NAME.tar` (or `NAME.parquet`) with `NAME.json`, its sidecar, beside it. The same inputs give the
same bytes.
"""

import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from pipelines.shards.storage import Folder
from repfusion.config import Strict
from repfusion.files import file_sha256, json_bytes

SCHEMA = 3
"""Raised when a stage's code changes the bytes it writes and no field of the stage says so; part of every
fingerprint.
"""


NO_LOSS = frozenset(
    {
        *("extra_image", "unused_member", "hidden_file", "no_extension", "metadata_file"),
        *("empty_rewriting", "endless_rewriting", "mended_quote"),
    }
)
"""Reasons of drops by which no sample is lost: members of an input that belong to none, and captions that are
not rewritten as asked.
"""


class ShardError(ValueError):
    """A shard on disk that is not what its sidecar or the tar format says; the message names it."""


class SideFile(Strict):
    """A file that belongs to a shard or a stage: a list of drops, statistics."""

    bytes: int
    sha256: str


class Sidecar(Strict):
    """What a complete shard holds and where it came from."""

    name: str
    """The shard's name without extension, such as `00042`."""
    file: str
    """The data file in the stage's folder."""
    fingerprint: str
    """Fingerprint of the stage that wrote the shard."""
    inputs: dict[str, str]
    """sha256 of the upstream shards it was made from, by stage."""
    samples: int
    bytes: int
    sha256: str
    drops: dict[str, int]
    """Samples left out, by reason."""
    files: dict[str, SideFile]
    """Further files of the shard, by name."""
    seconds: float
    versions: dict[str, str]

    @property
    def entries(self) -> int:
        """Samples and those that were dropped."""
        return self.samples + sum(number for reason, number in self.drops.items() if reason not in NO_LOSS)


def side_file(path: Path) -> SideFile:
    return SideFile(bytes=path.stat().st_size, sha256=file_sha256(path))


def sample_key(index: int) -> str:
    """The key of the sample at a position of the source: nine digits, unique over all shards."""
    return f"{index:09d}"


def shard_name(index: int) -> str:
    return f"{index:05d}"


@cache
def library_versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages; one that is not installed is left out."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_sidecar(folder: Folder, name: str) -> Sidecar | None:
    """The sidecar of a shard, or None where there is none or it is not readable as one."""
    try:
        return Sidecar.model_validate_json(folder.read(f"{name}.json"))
    except (FileNotFoundError, ValueError):
        return None


class ShardCommit:
    """Collects one shard's output; `commit` puts it in place, its sidecar last. Leaving the block without one
    discards it.

    The block's files live in `staging`, a local folder, so that a killed worker leaves either the whole shard
    or none of it.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        fingerprint: str,
        inputs: dict[str, str],
        packages: tuple[str, ...] = (),
    ):
        self.folder, self.name, self.fingerprint, self.inputs, self.packages = (
            folder,
            name,
            fingerprint,
            inputs,
            packages,
        )
        self.samples = 0
        self.drops: list[tuple[str, str, str]] = []
        self.known: dict[str, SideFile] = {}
        """Size and sha256 of staged files, of those that were taken while they were written."""
        self._start = time.perf_counter()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.staging = self._stack.enter_context(self.folder.staging(self.name))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def drop(self, key: str, reason: str, detail: str = "") -> None:
        """Records a sample that is left out; `reason` is counted, `detail` is for people, and may quote
        names that are not UTF-8.
        """
        self.drops.append((key, reason, detail.encode(errors="backslashreplace").decode()))

    def check_drops(self, max_fraction: float) -> None:
        """Raises ShardError, with a table of reasons, where more than a share of the samples was dropped."""
        lost = [drop for drop in self.drops if drop[1] not in NO_LOSS]
        total = self.samples + len(lost)
        if len(lost) <= max_fraction * total:
            return
        counts = Counter(reason for _, reason, _ in lost).most_common()
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
        _, _, detail = lost[0]
        raise ShardError(
            f"shard {self.name}: {len(lost)} of {total} samples dropped, "
            f"more than max_drop_fraction {max_fraction}: {reasons}; "
            f"the first: {detail}"
        )

    def write_drops(self) -> None:
        """Lists every drop in `NAME.drops.parquet`: key, reason, detail. No drops, no file."""
        if not self.drops:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(column, pa.string()) for column in zip(*sorted(self.drops), strict=True)]
        table = pa.table(columns, names=["key", "reason", "detail"])
        pq.write_table(table, self.staging / f"{self.name}.drops.parquet")

    def commit(self, file: str) -> Sidecar:
        """Moves the staged files into the stage's folder and writes the sidecar; `file` is the one that
        holds the samples.
        """
        staged = sorted(path.name for path in self.staging.iterdir())
        described = {name: self.known.get(name) or side_file(self.staging / name) for name in staged}
        main = described.pop(file)
        sidecar = Sidecar(
            name=self.name,
            file=file,
            fingerprint=self.fingerprint,
            inputs=self.inputs,
            samples=self.samples,
            bytes=main.bytes,
            sha256=main.sha256,
            drops=dict(sorted(Counter(reason for _, reason, _ in self.drops).items())),
            files=described,
            seconds=round(time.perf_counter() - self._start, 3),
            versions=library_versions("repfusion", *self.packages),
        )
        old = read_sidecar(self.folder, self.name)
        if old is not None:
            # while there is a sidecar to name them: killed here, the shard is incomplete, and made again
            self.folder.remove(*({old.file, *old.files} - set(staged)))
        # an old sidecar must not vouch for the new files, were we killed between the two
        self.folder.remove(f"{self.name}.json")
        for name in staged:
            self.folder.put(name, self.staging / name)
        self.folder.write(f"{self.name}.json", json_bytes(sidecar.model_dump(mode="json")))
        return sidecar
