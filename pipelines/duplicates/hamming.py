"""Hashes of 64 bits in order of time -> for each, the earliest that stays and differs in few enough bits."""

from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Bool, Int, UInt64

HASH_BITS = 64
CHUNK = 1 << 17
"""Hashes compared at the same time; bounds the memory of the search."""
SQUARE = 1 << 10
LEAF = 1 << 10
"""Up to so many hashes are compared all with all."""
GROUP = 64
"""A larger group of hashes that agree in some bits is divided by further bits, up to MAX_DEPTH times."""
MAX_DEPTH = 3
BUDGET = 8
"""How much longer than for evenly spread hashes a search may take before the hashes are halved instead."""
SORT_COST = 20
"""Time to sort one hash, in comparisons of two."""


def starts_of_runs(values: UInt64[np.ndarray, "n ..."]) -> Bool[np.ndarray, " n"]:
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
    in_time = np.sort(_groups_of_equals(hashes)[0])
    kept = in_time[_greedy(hashes[in_time], bits)]
    # sorted once more rather than held through the search, whose memory is the largest
    firsts, order, group = _groups_of_equals(hashes)
    result = np.empty(len(hashes), np.int64)
    result[order] = kept[np.searchsorted(in_time, firsts)][group]
    return result


def _groups_of_equals(
    hashes: UInt64[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Position of the first of each value, values ascending; the order that sorts them; the value's number at
    each place of that order.
    """
    order = np.argsort(hashes, kind="stable")
    new = starts_of_runs(hashes[order])
    return order[new], order, np.cumsum(new) - 1


def _greedy(hashes: UInt64[np.ndarray, " n"], bits: int) -> Int[np.ndarray, " n"]:
    """What `first_near` gives, for hashes that are all different."""
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
    kept, rows = np.arange(len(hashes)), np.arange(len(hashes))
    budget = BUDGET * _plan(len(hashes), HASH_BITS, bits)[1]
    while True:
        search = _Search(hashes[rows], bits, budget=budget)
        search.run(np.arange(len(rows)), MAX_DEPTH)
        budget = search.budget
        stays = search.earliest == np.arange(len(rows))
        goes = ~stays & stays[search.earliest]
        kept[rows[goes]] = rows[search.earliest[goes]]
        if (stays | goes).all():
            return kept
        rows = rows[~goes & (~stays | search.has_later)]


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

    def __init__(
        self,
        hashes: UInt64[np.ndarray, " n"],
        bits: int,
        num_old: int | None = None,
        budget: float = float("inf"),
    ):
        self.hashes, self.bits, self.num_old, self.budget = hashes, bits, num_old, budget
        self.earliest = np.arange(len(hashes))
        """Position of the earliest neighbour before each; its own where there is none."""
        self.has_later = np.zeros(len(hashes), bool)
        """Whether there is a neighbour after it."""

    def run(self, rows: Int[np.ndarray, " m"], depth: int) -> None:
        """Compares some of the hashes, by groups of groups of equal bits up to a depth. Raises _TooDenseError
        where all are compared with all and this takes far longer than for hashes that are spread evenly.
        """
        values = self.hashes[rows]
        differing = int(np.bitwise_or.reduce(values ^ values[0]))
        del values
        varying = [bit for bit in range(HASH_BITS) if differing >> bit & 1]
        pairs = len(rows) ** 2 / 2
        num_blocks, cost = _plan(len(rows), len(varying), self.bits)
        if depth == 0 or pairs <= cost:
            self._spend(pairs)
            self._compare_all(np.sort(rows))
            return
        blocks = np.array_split(varying, num_blocks)
        for chosen in combinations(blocks, num_blocks - self.bits):
            self._spend(SORT_COST * len(rows))
            self._group(rows, np.uint64(sum(1 << int(bit) for block in chosen for bit in block)), depth)

    def _spend(self, cost: float) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise _TooDenseError

    def _group(self, rows: Int[np.ndarray, " m"], mask: np.uint64, depth: int) -> None:
        """Compares the hashes that agree in the bits of a mask."""
        keys = self.hashes[rows] & mask
        order = np.argsort(keys)
        starts = np.flatnonzero(starts_of_runs(keys[order]))
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
                if len(near):
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

    def _compare_all(self, rows: Int[np.ndarray, " m"]) -> None:
        """Compares ascending rows all with all, in squares."""
        num_old = len(rows) if self.num_old is None else int(np.searchsorted(rows, self.num_old))
        for start in range(0, num_old, SQUARE):
            old = rows[start : min(start + SQUARE, num_old)]
            for begin in range(start if self.num_old is None else num_old, len(rows), SQUARE):
                new = rows[begin : begin + SQUARE]
                near = np.bitwise_count(self.hashes[old][:, None] ^ self.hashes[new]) <= self.bits
                if begin == start:
                    near = np.triu(near, 1)
                hit = near.any(axis=0)
                # the first of a column is the earliest
                first = old[near.argmax(axis=0)[hit]]
                self.earliest[new[hit]] = np.minimum(self.earliest[new[hit]], first)
                self.has_later[old[near.any(axis=1)]] = True


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
