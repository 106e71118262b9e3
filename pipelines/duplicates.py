"""The verdicts of all shards -> `duplicates.parquet`: which samples repeat an earlier one, and which that is.

Samples come in the order of the shards. One is an exact duplicate if an earlier one that stays has the same
image bytes, else a near duplicate if the perceptual hash of an earlier one that stays differs in few enough
bits, else it stays. So no two that stay are alike, and each that goes is like the one it names; images that
are linked only through a chain of others are not.
"""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, UInt64

from pipelines.storage import Folder
from pipelines.store import ShardError, Sidecar

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.curate import CurateConfig
    from pipelines.manifest import ShardTable

DUPLICATES = "duplicates.parquet"
DIGEST_BYTES = 16
"""Of a sha256 that stand for an image: two of 10^9 images share them by chance once in 10^21 data sets."""

HASH_BITS = 64
READERS = 8
"""Shards' verdicts read at the same time."""
ROW_GROUP = 1 << 16
"""Rows of `duplicates.parquet` that are read together."""
CHUNK = 1 << 20
"""Hashes compared at the same time; bounds the memory of the search."""
SQUARE = 1 << 10
LEAF = 1 << 10
"""Up to so many hashes are compared all with all."""
GROUP = 256
"""A larger group of hashes that agree in some bits is divided by further bits, up to MAX_DEPTH times."""
MAX_DEPTH = 3
MAX_ROUNDS = 64
BUDGET = 8
"""How much longer than for evenly spread hashes a search may take before the hashes are halved instead."""
SORT_COST = 20
"""Time to sort one hash, in comparisons of two."""


def find_duplicates(folder: Folder, shards: "ShardTable", config: "CurateConfig") -> list[str]:
    """Writes `duplicates.parquet` (key, reason, duplicate_of; ascending keys) into the folder of `judge`;
    returns its name. Samples that `judge` drops neither count nor are listed.

    Raises:
        ShardError: where the verdicts of a shard are missing or changed.
    """
    if config.duplicates == "keep":
        _write(folder, [], [], [])
        return [DUPLICATES]
    positions, digests, hashes = _read_images(folder, shards)
    first = first_equal(digests)
    del digests
    kept = first if config.duplicates == "exact" else first_near(hashes, config.near_duplicate_bits)
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
    import pyarrow.parquet as pq

    try:
        data = folder.read(file)
    except FileNotFoundError as error:
        raise ShardError(f"{folder / file}: no such file; re-run the stage '{folder.name}'") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(
            f"{folder / file}: not the bytes that its sidecar describes; run 'verify', which rebuilds it"
        )
    return pq.read_table(io.BytesIO(data), columns=columns)


class DuplicateList:
    """`duplicates.parquet` of a folder, of which only the part is read that a shard needs."""

    def __init__(self, folder: Folder):
        """Raises ShardError where there is none."""
        import pyarrow.parquet as pq

        self._folder = folder
        try:
            with folder.open(DUPLICATES) as stream:
                self._metadata = pq.read_metadata(stream)
        except FileNotFoundError as error:
            raise ShardError(
                f"{folder / DUPLICATES}: no such file; re-run the stage '{folder.name}'"
            ) from error

    def of(self, keys: "pa.ChunkedArray") -> dict[str, tuple[str, str]]:
        """Those of the keys that are duplicates -> (reason, key of the sample that stays)."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if not len(keys) or not self._metadata.num_rows:
            return {}
        ends = pc.min_max(keys).as_py()
        groups = [index for index in range(self._metadata.num_row_groups) if self._overlaps(index, ends)]
        if not groups:
            return {}
        with self._folder.open(DUPLICATES) as stream:
            table = pq.ParquetFile(stream, metadata=self._metadata).read_row_groups(groups)
        table = table.filter(pc.is_in(table["key"], value_set=keys.combine_chunks()))
        return {row["key"]: (row["reason"], row["duplicate_of"]) for row in table.to_pylist()}

    def _overlaps(self, index: int, ends: dict[str, str]) -> bool:
        known = self._metadata.row_group(index).column(0).statistics
        if known is None or not known.has_min_max:
            return True
        return known.min <= ends["max"] and known.max >= ends["min"]


def _read_images(
    folder: Folder, shards: "ShardTable"
) -> tuple[Int[np.ndarray, " n"], UInt64[np.ndarray, "n 2"], UInt64[np.ndarray, " n"]]:
    """Position among all rows, digest and perceptual hash of every sample that `judge` leaves in."""
    import pyarrow.compute as pc

    positions = np.empty(shards.samples, np.int64)
    digests = np.empty((shards.samples, 2), np.uint64)
    hashes = np.empty(shards.samples, np.uint64)
    start, used = 0, 0
    for table in _read_shards(folder, shards, range(len(shards)), ["reason", "digest", "hash"]):
        rows = np.flatnonzero(pc.is_null(table["reason"]).to_numpy())
        stop = used + len(rows)
        positions[used:stop] = start + rows
        left = table.take(rows).combine_chunks()
        if len(rows):
            digests[used:stop] = np.frombuffer(b"".join(left["digest"].to_pylist()), np.uint64).reshape(-1, 2)
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
    new = _starts(digests[rows])
    first[rows] = rows[new][np.cumsum(new) - 1]
    return first


def _starts(values: UInt64[np.ndarray, "n ..."]) -> Bool[np.ndarray, " n"]:
    """Where a sorted array's value differs from the one before."""
    new = np.ones(len(values), bool)
    differs = values[1:] != values[:-1]
    new[1:] = differs if values.ndim == 1 else differs.any(axis=1)
    return new


def first_near(hashes: UInt64[np.ndarray, " n"], bits: int) -> Int[np.ndarray, " n"]:
    """Position of the earliest hash that stays and differs in at most `bits` bits, for each; its own for
    those that stay.

    Equal hashes share their fate, so that only one of each is searched: a million images of one colour cost
    one.
    """
    order = np.argsort(hashes, kind="stable")
    new = _starts(hashes[order])
    firsts = order[new]
    in_time = np.sort(firsts)
    kept = in_time[_greedy(hashes[in_time], bits)]
    of_group = kept[np.searchsorted(in_time, firsts)]
    result = np.empty(len(hashes), np.int64)
    result[order] = of_group[np.cumsum(new) - 1]
    return result


def _greedy(hashes: UInt64[np.ndarray, " n"], bits: int) -> Int[np.ndarray, " n"]:
    """As `first_near`, for hashes that are all different."""
    if bits == 0:
        return np.arange(len(hashes))
    if len(hashes) <= LEAF:
        return _greedy_small(hashes, bits)
    try:
        return _greedy_rounds(hashes, bits)
    except _TooDenseError:
        half = len(hashes) // 2
    # a dense cloud of hashes has few that stay: those of the first half thin out the second
    kept = np.arange(len(hashes))
    kept[:half] = _greedy(hashes[:half], bits)
    old = np.flatnonzero(kept[:half] == np.arange(half))
    rows = np.concatenate([old, np.arange(half, len(hashes))])
    search = _Search(hashes[rows], bits, len(old))
    search.run(np.arange(len(rows)), MAX_DEPTH)
    found = search.earliest[len(old) :]
    left = found >= len(old)
    kept[half:][~left] = rows[found[~left]]
    rest = half + np.flatnonzero(left)
    kept[rest] = rest[_greedy(hashes[rest], bits)]
    return kept


def _greedy_small(hashes: UInt64[np.ndarray, " n"], bits: int) -> Int[np.ndarray, " n"]:
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
    kept = np.arange(len(hashes))
    undecided = np.ones(len(hashes), bool)
    for index in range(len(hashes)):
        if undecided[index]:
            near[index] &= undecided
            kept[near[index]] = index
            undecided &= ~near[index]
    return kept


def _greedy_rounds(hashes: UInt64[np.ndarray, " n"], bits: int) -> Int[np.ndarray, " n"]:
    """Each round decides those whose earliest neighbour is decided. What no longer matters leaves the search,
    so that the first round costs nearly all. Raises _TooDenseError where another way is faster.
    """
    kept = rows = np.arange(len(hashes))
    kept = kept.copy()
    for _ in range(MAX_ROUNDS):
        search = _Search(hashes[rows], bits)
        search.run(np.arange(len(rows)), MAX_DEPTH)
        stays = search.earliest == np.arange(len(rows))
        goes = ~stays & stays[search.earliest]
        kept[rows[goes]] = rows[search.earliest[goes]]
        if (stays | goes).all():
            return kept
        rows = rows[~goes & (~stays | search.has_later)]
    raise _TooDenseError


class _TooDenseError(Exception):
    pass


class _Search:
    """Finds the earliest hash that differs in at most `bits` bits, for each of different hashes. Exact.

    The varying bits are cut into blocks. Two hashes that differ in at most `bits` bits agree in all but that
    many blocks, so they meet in a group of hashes with equal chosen blocks, for one of the choices of blocks
    (Manku, Jain and Das Sarma, Detecting Near-Duplicates for Web Crawling, 2007). Each choice costs a sort
    and stores nothing.

    Args:
        hashes: in order of time.
        bits: at least 1.
        num_old: None compares all with all; else only the first `num_old` with the others.
    """

    def __init__(self, hashes: UInt64[np.ndarray, " n"], bits: int, num_old: int | None = None):
        self.hashes, self.bits, self.num_old = hashes, bits, num_old
        self.earliest = np.arange(len(hashes))
        """Position of the earliest neighbour before each; its own where there is none."""
        self.has_later = np.zeros(len(hashes), bool)
        """Whether there is a neighbour after it."""
        self._budget = BUDGET * _plan(len(hashes), HASH_BITS, bits)[1] if num_old is None else float("inf")

    def run(self, rows: Int[np.ndarray, " m"], depth: int) -> None:
        """Compares some of the hashes, by groups of groups of equal bits up to a depth. Raises _TooDenseError
        where all are compared with all and this takes far longer than for hashes that are spread evenly.
        """
        values = self.hashes[rows]
        differing = int(np.bitwise_or.reduce(values ^ values[0]))
        varying = [bit for bit in range(HASH_BITS) if differing >> bit & 1]
        pairs = len(rows) ** 2 / 2
        num_blocks, cost = _plan(len(rows), len(varying), self.bits)
        if depth == 0 or pairs <= cost:
            self._spend(pairs)
            if self.num_old is None:
                self._compare(rows, np.full(len(rows), len(rows)))
            else:
                self._compare_old(np.sort(rows))
            return
        blocks = np.array_split(varying, num_blocks)
        for chosen in combinations(blocks, num_blocks - self.bits):
            self._spend(SORT_COST * len(rows))
            self._group(rows, np.uint64(sum(1 << int(bit) for block in chosen for bit in block)), depth)

    def _spend(self, cost: float) -> None:
        self._budget -= cost
        if self._budget < 0:
            raise _TooDenseError

    def _group(self, rows: Int[np.ndarray, " m"], mask: np.uint64, depth: int) -> None:
        """Compares the hashes that agree in the bits of a mask."""
        keys = self.hashes[rows] & mask
        order = np.argsort(keys)
        starts = np.flatnonzero(_starts(keys[order]))
        rows = rows[order]
        del keys, order
        lengths = np.diff(starts, append=len(rows))
        useful = lengths > 1
        if self.num_old is not None:
            num_old = np.add.reduceat(rows < self.num_old, starts, dtype=np.int64)
            useful &= (num_old > 0) & (num_old < lengths)
        for index in np.flatnonzero(useful & (lengths > GROUP)):
            self.run(rows[starts[index] : starts[index] + lengths[index]], depth - 1)
        useful &= lengths <= GROUP
        self._spend(float(np.square(lengths[useful]).sum() / 2))
        inside = np.repeat(useful, lengths)
        lengths = lengths[useful]
        self._compare(rows[inside], np.repeat(np.cumsum(lengths), lengths))

    def _compare(self, rows: Int[np.ndarray, " m"], ends: Int[np.ndarray, " m"]) -> None:
        """Compares each row with those after it up to its end."""
        hashes = self.hashes[rows]
        for start in range(0, len(rows), CHUNK):
            left = np.arange(start, min(start + CHUNK, len(rows)))
            step = 1
            while len(left := left[left + step < ends[left]]):
                near = left[np.bitwise_count(hashes[left] ^ hashes[left + step]) <= self.bits]
                self._enter(rows[near], rows[near + step])
                step += 1

    def _enter(self, one: Int[np.ndarray, " k"], other: Int[np.ndarray, " k"]) -> None:
        """Pairs of neighbours, either way round."""
        earlier, later = np.minimum(one, other), np.maximum(one, other)
        if self.num_old is not None:
            across = (earlier < self.num_old) & (later >= self.num_old)
            earlier, later = earlier[across], later[across]
        np.minimum.at(self.earliest, later, earlier)
        self.has_later[earlier] = True

    def _compare_old(self, rows: Int[np.ndarray, " m"]) -> None:
        """Compares the old of ascending rows with the others, in squares."""
        num_old = int(np.searchsorted(rows, self.num_old))
        for start in range(0, num_old, SQUARE):
            old = rows[start : min(start + SQUARE, num_old)]
            for begin in range(num_old, len(rows), SQUARE):
                new = rows[begin : begin + SQUARE]
                near = np.bitwise_count(self.hashes[old][:, None] ^ self.hashes[new]) <= self.bits
                # the first of a column is the earliest
                hit = near.any(axis=0)
                first = old[near.argmax(axis=0)[hit]]
                self.earliest[new[hit]] = np.minimum(self.earliest[new[hit]], first)


def _plan(num_hashes: int, num_bits: int, bits: int) -> tuple[int, float]:
    """Into how many blocks to cut, and the cost in comparisons, least for hashes that are spread evenly. The
    cost is infinite where there are too few bits to cut.
    """
    best, least = 0, float("inf")
    for blocks in range(bits + 1, min(num_bits, 4 * bits + 4) + 1):
        alike = num_bits * (blocks - bits) / blocks
        cost = comb(blocks, bits) * num_hashes * (SORT_COST + num_hashes / 2 ** (alike + 1))
        if cost < least:
            best, least = blocks, cost
    return best, least
