"""Jobs -> arrays, on all cores; each job's arrays are kept in a file, so that what was cut off goes on."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from repfusion.files import atomic_path
from repfusion.foundation.deadline import OutOfTime, has_come

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """Where arrays are kept, by the number of their job."""

    folder: Path
    made_from: str
    """Says all that decides the arrays; files that say otherwise are made anew."""

    def read(self, number: int) -> Arrays | None:
        """The arrays of a job; None where there are none, or others."""
        path = self._path(number)
        if not path.is_file():
            return None
        with safe_open(str(path), "np") as file:
            is_right = (file.metadata() or {}).get("made_from") == self.made_from
            return {name: file.get_tensor(name) for name in file.keys()} if is_right else None

    def write(self, number: int, arrays: Arrays) -> None:
        """Keeps the arrays of a job, whole or not at all."""
        with atomic_path(self._path(number)) as temporary:
            save_file(arrays, str(temporary), {"made_from": self.made_from})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def in_chunks(
    work: Callable[..., Arrays],
    jobs: Sequence[tuple[Any, ...]],
    num_processes: int | None = None,
    kept: Kept | None = None,
    until: float | None = None,
) -> list[Arrays]:
    """What `work` makes of each job's arguments, in their order.

    Args:
        work: a function of a module, since other processes call it.
        jobs: arguments.
        num_processes: None is one a core; a single one is this process.
        kept: is read first, and written; None keeps nothing.
        until: a deadline, in seconds of `time.monotonic`.

    Raises:
        OutOfTime: the deadline came first; at least one more job is done and kept.
    """
    found = {number: kept and kept.read(number) for number in range(len(jobs))}
    left = [number for number, arrays in found.items() if arrays is None]
    num_processes = min(len(left), num_processes or len(os.sched_getaffinity(0)))
    if num_processes <= 1:
        calls = {number: partial(work, *jobs[number]) for number in left}
        _collect(calls, found, kept, until)
    else:
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as executor:
            futures = {number: executor.submit(work, *jobs[number]) for number in left}
            try:
                _collect({n: one.result for n, one in futures.items()}, found, kept, until)
            except OutOfTime:
                executor.shutdown(cancel_futures=True)
                ended = {n: one.result for n, one in futures.items() if not one.cancelled()}
                _collect({n: call for n, call in ended.items() if found[n] is None}, found, kept, None)
                raise
    return [arrays for arrays in found.values() if arrays is not None]


def _collect(
    calls: Mapping[int, Callable[[], Arrays]],
    found: dict[int, Arrays | None],
    kept: Kept | None,
    until: float | None,
) -> None:
    for place, (number, call) in enumerate(
        tqdm(calls.items(), "chunks", mininterval=5, disable=len(calls) < 2), 1
    ):
        found[number] = arrays = call()
        if kept is not None:
            kept.write(number, arrays)
        if place < len(calls) and has_come(until):
            raise OutOfTime(f"{place} of {len(calls)} chunks of scenes are drawn")


def joined(parts: Sequence[Mapping[str, np.ndarray]], name: str, fill: int = 0) -> np.ndarray:
    """The arrays of a name under each other, their last axis filled up to the longest."""
    arrays = [part[name] for part in parts]
    width = max(array.shape[-1] for array in arrays)
    return np.concatenate(
        [
            np.pad(one, [(0, 0)] * (one.ndim - 1) + [(0, width - one.shape[-1])], constant_values=fill)
            for one in arrays
        ]
    )
