"""Work in the time that nobody else wants, until it is to go on as any other."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CAN_IDLE = hasattr(os, "SCHED_IDLE")


class Pace:
    """Calls pieces of work in a thread that Linux runs only where a processor has nothing else to do; after
    `lift`, right here.

    A process without privileges cannot take a thread out of SCHED_IDLE, but its other threads never entered
    it: what is lifted goes on in them at the next piece at the latest.
    """

    def __init__(self, is_idle: bool):
        self.is_idle = is_idle and CAN_IDLE
        self._thread = ThreadPoolExecutor(1, "idle", initializer=self._sink)
        self._thread_id: int | None = None

    def _sink(self) -> None:
        self._thread_id = int(Path("/proc/thread-self").readlink().name)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    def __call__(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result() if self.is_idle else work()

    def lift(self) -> None:
        self.is_idle = False
        if self._thread_id is not None:
            with suppress(OSError):
                os.sched_setscheduler(self._thread_id, os.SCHED_OTHER, os.sched_param(0))

    def waited_sec(self) -> float:
        """How long the work was ready to run while others had the processor."""
        if self._thread_id is None:
            return 0.0
        with suppress(OSError):
            text = Path(f"/proc/self/task/{self._thread_id}/schedstat").read_text()
            return int(text.split()[1]) / 1e9
        return 0.0
