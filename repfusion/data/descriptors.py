"""Files that are read at random -> a bounded number of descriptors, the least recently used closed first.

A process may open about a thousand files, a data set has up to 100,000 shards in each of its columns.
"""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARE = 4
"""An n-th of the files that this process may open."""
MOST = 1024


class OpenFiles:
    """Descriptors of files that were read last. Threads may read at the same time, each with a descriptor of
    its own: one that is in use is not among those that may be closed.

    Args:
        most: descriptors that stay open; None is a quarter of what the process may have.
    """

    def __init__(self, most: int | None = None):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = limit == resource.RLIM_INFINITY
        self.most = most or (MOST if unlimited else max(1, min(MOST, limit // SHARE)))
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def open(self, path: str) -> Iterator[int]:
        """A descriptor for reading, this thread's for the length of the block. Raises OSError."""
        with self._lock:
            descriptor = self._idle.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            self._keep(path, descriptor)

    def _keep(self, path: str, descriptor: int) -> None:
        with self._lock:
            surplus = [self._idle.pop(path, None)]
            self._idle[path] = descriptor
            if len(self._idle) > self.most:
                surplus.append(self._idle.popitem(last=False)[1])
        for one in surplus:
            if one is not None:
                os.close(one)

    def close(self, folder: Path) -> None:
        """Closes the files of a folder that nobody reads."""
        with self._lock:
            found = [path for path in self._idle if os.path.dirname(path) == str(folder)]
            closed = [self._idle.pop(path) for path in found]
        for one in closed:
            os.close(one)


SHARDS_OPEN = OpenFiles()
"""One for all columns and data sets of the process, as the limit is."""
