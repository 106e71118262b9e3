"""Jobs -> arrays, on all cores; each job's arrays are kept in a file, so that what was cut off goes on."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from repfusion.files import atomic_path
from repfusion.foundation.deadline import OutOfTime, has_come

Arrays = dict[str, np.ndarray]


def in_chunks(
    work: Callable[..., Arrays],
    jobs: Sequence[tuple[Any, ...]],
    num_processes: int | None = None,
    folder: Path | None = None,
    until: float | None = None,
) -> list[Arrays]:
    """What `work` makes of each job's arguments, in their order.

    Args:
        work: a function of a module, since other processes call it.
        jobs: arguments.
        num_processes: None is one a core; a single one is this process.
        folder: keeps the arrays of each job, and is read first; None keeps nothing.
        until: a deadline, in seconds of `time.monotonic`.

    Raises:
        OutOfTime: the deadline came first; at least one more job is done and kept.
    """
    found = [_read(folder, number) for number in range(len(jobs))]
    left = [number for number, arrays in enumerate(found) if arrays is None]
    num_processes = min(len(left), num_processes or len(os.sched_getaffinity(0)))
    executor = ProcessPoolExecutor(num_processes, get_context("spawn")) if num_processes > 1 else None
    try:
        calls = {
            number: partial(work, *jobs[number])
            if executor is None
            else executor.submit(work, *jobs[number]).result
            for number in left
        }
        for place, (number, call) in enumerate(tqdm(calls.items(), desc="chunks", mininterval=5), 1):
            found[number] = arrays = call()
            if folder is not None:
                with atomic_path(folder / _name(number)) as temporary:
                    save_file(arrays, str(temporary))
            if place < len(left) and has_come(until):
                raise OutOfTime(f"{place} of {len(left)} chunks of scenes are drawn")
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
    return [arrays for arrays in found if arrays is not None]


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _read(folder: Path | None, number: int) -> Arrays | None:
    if folder is None or not (path := folder / _name(number)).is_file():
        return None
    return load_file(str(path))


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
