"""Which sample of which data set each position of a training reads: a pure function of the seed and the
position, so that resuming takes one integer.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

BLOCK = 1024
"""Positions over which the shares of the data sets hold; within one their order is shuffled."""


def hash64(*parts: object) -> int:
    """64 bits of the parts, the same on every machine and under every version of the libraries."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fraction(name: str, seed: int) -> float:
    """A number in [0, 1) of a seed, apart from those of other names; 53 bits."""
    return (hash64(name, seed) >> 11) / 2**53


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample is one of the `share` that training leaves out for evaluation: by its key alone, so
    that neither more samples of a data set nor a larger share bring one of these back.
    """
    return fraction(f"held out {key}", 0) < share


def sample_seed(seed: int, dataset: str, epoch: int, key: str) -> int:
    """64 bits that decide the caption, noise level, noise and dropped condition of a sample in an epoch of
    its data set, whatever its position, the batch, the rank and the data sets beside it.
    """
    return hash64("sample", seed, dataset, epoch, key)


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """The part of all positions that each data set gets.

    Raises:
        ValueError: a weight is no positive number, or so small that blocks would go without that data set.
    """
    exact = {name: _exact(name, weight) for name, weight in weights.items()}
    total = sum(exact.values())
    for name, weight in exact.items():
        if weight * BLOCK < total:
            raise ValueError(
                f"data set {name!r} has weight {weights[name]:g}, less than 1/{BLOCK} of the sum "
                f"{float(total):g}; raise it, or leave the data set out"
            )
    return {name: weight / total for name, weight in exact.items()}


def _exact(name: str, weight: float) -> Fraction:
    """The decimal number that was written: 0.1 is a tenth."""
    if not 0 < weight < float("inf"):
        raise ValueError(f"data set {name!r} has weight {weight}; expected a number above 0")
    return Fraction(str(weight))


@dataclass(frozen=True)
class Occurrence:
    """A sample in an epoch of its data set."""

    dataset: str
    epoch: int
    index: int


class SampleOrder:
    """Positions of a training -> samples.

    After every block of 1024 positions each data set has had its share of all positions so far, to less than
    one sample; which position of the block is whose is shuffled. A data set walks through epochs of its own:
    each is a fresh permutation of all its samples.

    Args:
        seed: decides the order.
        num_samples: of each data set, by name. The order of the names makes no difference.
        weights: how often each is drawn, relative to the others.

    Raises:
        ValueError: a data set is empty, or see `shares_of`.
    """

    def __init__(self, seed: int, num_samples: Mapping[str, int], weights: Mapping[str, float]):
        self.seed, self.names = seed, sorted(num_samples)
        self.num_samples = [num_samples[name] for name in self.names]
        if 0 in self.num_samples:
            raise ValueError(f"data set {self.names[self.num_samples.index(0)]!r} holds no samples")
        self.shares = shares_of({name: weights[name] for name in self.names})
        self.bounds = list(accumulate(self.shares.values()))
        # a batch may span the end of a block or an epoch, so that two are in use
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._epochs = {name: lru_cache(maxsize=2)(self._make_epoch) for name in self.names}

    def at(self, position: int) -> Occurrence:
        block, offset = divmod(position, BLOCK)
        datasets, turns = self._block(block)
        number = int(datasets[offset])
        name = self.names[number]
        epoch, offset = divmod(int(turns[offset]), self.num_samples[number])
        return Occurrence(name, epoch, int(self._epochs[name](number, epoch)[offset]))

    def turns_before(self, block: int) -> list[int]:
        """How many positions before a block each data set has had; exact integers at any distance."""
        ends = [0, *(block * BLOCK * bound // 1 for bound in self.bounds)]
        return [int(end - start) for start, end in pairwise(ends)]

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set's number of each position of a block, and which of its turns this is."""
        first, after = self.turns_before(block), self.turns_before(block + 1)
        counts = [end - start for start, end in zip(first, after, strict=True)]
        generator = np.random.default_rng(hash64("block", self.seed, block))
        datasets = generator.permutation(np.repeat(np.arange(len(counts)), counts))
        turns = np.empty(BLOCK, np.int64)
        for number, start in enumerate(first):
            turns[datasets == number] = np.arange(start, start + counts[number])
        return datasets, turns

    def _make_epoch(self, number: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(hash64("epoch", self.seed, self.names[number], epoch))
        # half the memory of int64: a data set of 30 million is 120 MB an epoch
        size = self.num_samples[number]
        return generator.permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))
