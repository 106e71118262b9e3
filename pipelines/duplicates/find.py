"""The verdicts of all shards -> `duplicates.parquet`: which samples repeat an earlier one, and which that is.

Samples come in the order of the shards. One is an exact duplicate if an earlier one that stays has the same
image bytes, else a near duplicate if the perceptual hash of an earlier one that stays differs in few enough
bits, else it stays. So no two that stay are alike, and each that goes is like the one it names; images that
are linked only through a chain of others are not.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int, UInt64

from pipelines.duplicates.hamming import first_near, starts_of_runs
from pipelines.shards.parquet import open_parquet, parse_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, Sidecar

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.shards.manifest import ShardTable

Duplicates = Literal["keep", "exact", "near"]
"""What counts as a duplicate: nothing, the same bytes, or a like image too."""

DUPLICATES = "duplicates.parquet"
DIGEST_BYTES = 16
"""Bytes of a sha256 that stand for an image: two of 10^9 share them by chance once in 10^21 data sets."""

READERS = 8
"""Shards' verdicts read at the same time."""
ROW_GROUP = 1 << 16
"""Rows of `duplicates.parquet` that are read together."""


def find_duplicates(
    folder: Folder, shards: "ShardTable", duplicates: Duplicates, near_duplicate_bits: int = 0
) -> list[str]:
    """Writes `duplicates.parquet` (key, reason, duplicate_of; ascending keys) into the folder of `judge`;
    returns its name. Samples that `judge` drops neither count nor are listed. Near duplicates differ in up to
    `near_duplicate_bits` of their 64.

    Raises:
        ShardError: where the verdicts of a shard are missing or changed.
    """
    if duplicates == "keep":
        _write(folder, [], [], [])
        return [DUPLICATES]
    positions, digests, hashes = _read_images(folder, shards, duplicates == "near")
    first = first_equal(digests)
    del digests
    kept = first if duplicates == "exact" else first_near(hashes, near_duplicate_bits)
    del hashes
    repeated = np.flatnonzero(kept != np.arange(len(kept)))
    exact = kept[repeated] == first[repeated]
    rows, originals = positions[repeated], positions[kept[repeated]]
    del positions, first, kept
    keys = _read_keys(folder, shards, rows, originals)
    reasons = np.where(exact, "exact_duplicate", "near_duplicate")
    _write(folder, keys[0], reasons, keys[1])
    return [DUPLICATES]


def read_verdicts(folder: Folder, name: str, sidecar: Sidecar | None, columns: list[str]) -> "pa.Table":
    """Columns of `NAME.parquet` as `judge` wrote it. Raises ShardError where it is missing or changed."""
    return _read_checked(folder, f"{name}.parquet", sidecar.sha256 if sidecar else None, columns)


def _read_checked(folder: Folder, file: str, sha256: str | None, columns: list[str]) -> "pa.Table":
    try:
        data = folder.read(file)
    except FileNotFoundError as error:
        raise ShardError(f"{folder / file}: no such file; re-run the stage '{folder.name}'") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(
            f"{folder / file}: not the bytes that its sidecar describes; run 'verify', which rebuilds it"
        )
    return parse_parquet(data, columns)


class DuplicateList:
    """`duplicates.parquet` of a folder, of which only the part is read that a shard needs."""

    def __init__(self, folder: Folder):
        """Raises ShardError where there is none."""
        self._folder = folder
        try:
            with open_parquet(folder, DUPLICATES) as parquet:
                self._metadata = parquet.metadata
        except FileNotFoundError as error:
            raise ShardError(
                f"{folder / DUPLICATES}: no such file; re-run the stage '{folder.name}'"
            ) from error

    def of(self, keys: "pa.ChunkedArray") -> dict[str, tuple[str, str]]:
        """The keys that are duplicates -> (reason, key of the sample that stays)."""
        import pyarrow.compute as pc

        if not len(keys) or not self._metadata.num_rows:
            return {}
        ends = pc.min_max(keys).as_py()
        groups = [index for index in range(self._metadata.num_row_groups) if self._overlaps(index, ends)]
        if not groups:
            return {}
        with open_parquet(self._folder, DUPLICATES, metadata=self._metadata) as parquet:
            table = parquet.read_row_groups(groups, use_threads=False)
        table = table.filter(pc.is_in(table["key"], value_set=keys.combine_chunks()))
        return {row["key"]: (row["reason"], row["duplicate_of"]) for row in table.to_pylist()}

    def _overlaps(self, index: int, ends: dict[str, str]) -> bool:
        known = self._metadata.row_group(index).column(0).statistics
        if known is None or not known.has_min_max:
            return True
        return known.min <= ends["max"] and known.max >= ends["min"]


def _read_images(
    folder: Folder, shards: "ShardTable", is_near: bool
) -> tuple[Int[np.ndarray, " n"], UInt64[np.ndarray, "n 2"], UInt64[np.ndarray, " m"]]:
    """Position among all rows, digest and, if near duplicates are asked for, perceptual hash of every sample
    that `judge` leaves in.
    """
    import pyarrow.compute as pc

    positions = np.empty(shards.samples, np.int64)
    digests = np.empty((shards.samples, 2), np.uint64)
    hashes = np.empty(shards.samples if is_near else 0, np.uint64)
    start, used = 0, 0
    for table in _read_shards(folder, shards, range(len(shards)), ["reason", "digest", *["hash"] * is_near]):
        rows = np.flatnonzero(pc.is_null(table["reason"]).to_numpy())
        stop = used + len(rows)
        positions[used:stop] = start + rows
        left = table.take(rows).combine_chunks()
        if len(rows):
            digests[used:stop] = np.frombuffer(b"".join(left["digest"].to_pylist()), np.uint64).reshape(-1, 2)
            if is_near:
                hashes[used:stop] = left["hash"].to_numpy()
        start, used = start + len(table), stop
    return positions[:used], digests[:used], hashes[:used]


def _read_shards(
    folder: Folder, shards: "ShardTable", indices: "range | list[int]", columns: list[str]
) -> Iterator["pa.Table"]:
    """Columns of shards, in order, several read at once and no more than that held."""
    files, digests = shards.column("file"), shards.column("sha256")
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(indices), READERS):
            yield from readers.map(
                lambda index: _read_checked(folder, files[index], digests[index], columns),
                indices[start : start + READERS],
            )


def _read_keys(folder: Folder, shards: "ShardTable", *wanted: Int[np.ndarray, " n"]) -> list["pa.Array"]:
    """The keys at positions among all rows, for each array of positions."""
    import pyarrow as pa

    needed = np.unique(np.concatenate(wanted))
    ends = np.cumsum(shards.column("samples"))
    owners = np.searchsorted(ends, needed, side="right")
    used, starts = np.unique(owners, return_index=True)
    parts = np.split(needed, starts[1:])
    keys = []
    tables = _read_shards(folder, shards, used.tolist(), ["key"])
    for index, part, table in zip(used, parts, tables, strict=False):
        begin = ends[index - 1] if index else 0
        keys.append(table["key"].take(part - begin).combine_chunks())
    joined = pa.concat_arrays(keys) if keys else pa.array([], pa.string())
    return [joined.take(pa.array(np.searchsorted(needed, positions))) for positions in wanted]


def _write(folder: Folder, keys: object, reasons: object, originals: object) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"key": keys, "reason": reasons, "duplicate_of": originals}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    with folder.staging("duplicates") as staging:
        pq.write_table(table.sort_by("key"), staging / DUPLICATES, row_group_size=ROW_GROUP)
        folder.put(DUPLICATES, staging / DUPLICATES)


def first_equal(digests: UInt64[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """Position of the first equal digest for each."""
    first = np.arange(len(digests))
    order = np.argsort(digests[:, 0])
    halves = digests[order, 0]
    same = halves[1:] == halves[:-1]
    member = np.zeros(len(digests), bool)
    member[1:] |= same
    member[:-1] |= same
    # those that share half a digest with another: hardly more than the duplicates
    rows = np.sort(order[member])
    del order, halves, same, member
    rows = rows[np.lexsort((digests[rows, 1], digests[rows, 0]))]
    new = starts_of_runs(digests[rows])
    first[rows] = rows[new][np.cumsum(new) - 1]
    return first
