"""Bytes -> other bytes, mostly like them: what disks, networks and strangers do to files."""

from collections.abc import Callable
from random import Random

NUMBERS = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"-1",
    b"9" * 12,
]
MAX_CHANGES = 6


def _place(random: Random, data: bytearray) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice([1, 2, 4, 8, 64, 512, 4096]))


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(random: Random, data: bytearray) -> None:
    start, _ = _place(random, data)
    number = random.choice(NUMBERS)
    data[start : start + len(number)] = number


def _noise(random: Random, data: bytearray) -> None:
    start, stop = _place(random, data)
    data[start:stop] = random.randbytes(stop - start)


def _zero(random: Random, data: bytearray) -> None:
    start, stop = _place(random, data)
    data[start:stop] = bytes(stop - start)


def _remove(random: Random, data: bytearray) -> None:
    start, stop = _place(random, data)
    del data[start:stop]


def _repeat(random: Random, data: bytearray) -> None:
    start, stop = _place(random, data)
    data[start:start] = data[start:stop] * random.choice([1, 2, 20])


def _insert(random: Random, data: bytearray) -> None:
    start, _ = _place(random, data)
    data[start:start] = random.choice([*NUMBERS, random.randbytes(random.randrange(64))])


def _cut(random: Random, data: bytearray) -> None:
    del data[random.randrange(len(data) + 1) :]


CHANGES: list[Callable[[Random, bytearray], None]] = [
    _flip, _flip, _overwrite, _noise, _zero, _remove, _repeat, _insert, _cut,
]  # fmt: skip


def mutate(random: Random, data: bytes) -> bytes:
    """One input in eight as it is, the others after one to six changes."""
    changed = bytearray(data)
    for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3, MAX_CHANGES])):
        random.choice(CHANGES)(random, changed)
    return bytes(changed)
