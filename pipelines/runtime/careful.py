"""A function that is called in a process of its own: an input that kills or stalls it costs one call, and not
the shard.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
START_SEC = 120.0
"""Seconds for the process to import what the function needs."""
ATTEMPTS = 2
"""Deaths that an input has to cause before it is blamed: the kernel kills for want of memory, too."""
PR_SET_PDEATHSIG = 1

KILLED = "killed_its_process"
"""Reason of drops of an input that does."""


class KilledError(RuntimeError):
    """A call that ended its process, or took too long; the text says which."""


class Careful:
    """Calls a function in a child process, one call at a time, from any thread. Arguments and results are
    pickled, and so is what the function raises.

    Args:
        factory: makes the function, in the child.
        timeout_sec: how long a call may take.
    """

    def __init__(self, factory: Callable[[], Callable[..., Any]], timeout_sec: float):
        self._factory, self._timeout_sec = factory, timeout_sec
        # the child dies with the thread that started it
        self._thread = ThreadPoolExecutor(1)
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.submit(self._stop).result()
        self._thread.shutdown()

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns or raises.

        Raises:
            KilledError: where it does neither.
        """
        return self._thread.submit(self._call, arguments).result()

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return self._ask(arguments)
            except (EOFError, OSError) as error:
                status = self._stop(patience_sec=5.0)
                if attempt + 1 == ATTEMPTS:
                    raise KilledError(_how_it_ended(status)) from error
        raise AssertionError

    def _ask(self, arguments: tuple[Any, ...]) -> Any:
        if self._child is None:
            self._start()
        assert self._child is not None
        connection = self._child[1]
        connection.send(arguments)
        if not connection.poll(self._timeout_sec):
            self._stop()
            raise KilledError(f"took longer than {self._timeout_sec:g} s")
        has_raised, found = connection.recv()
        if has_raised:
            raise found
        return found

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        # not by multiprocessing, whose children import the program that their parent runs: Ray's worker
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "pipelines.runtime.careful", str(theirs.fileno())]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        self._child = child, ours
        ours.send(self._factory)
        if not ours.poll(START_SEC):
            self._stop()
            raise TimeoutError(f"a process for single samples did not start within {START_SEC:g} s")
        ours.recv()

    def _stop(self, patience_sec: float = 0.0) -> int | None:
        """Ends the child; its exit status if it has ended by itself, negative for a signal."""
        if self._child is None:
            return None
        child, connection = self._child
        self._child = None
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience_sec)
        status = child.returncode
        child.kill()
        child.wait()
        connection.close()
        return status


def _how_it_ended(status: int | None) -> str:
    if status is None or status >= 0:
        return f"its process ended with status {status}"
    return f"its process was ended by {signal.Signals(-status).name}"


def _serve(connection: Connection) -> None:
    """The child: answers until its parent is gone, at which the kernel kills it, whatever it is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # a signal to the whole group is the parent's to answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = connection.recv()()
    connection.send(None)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = False, function(*arguments)
        except Exception as error:  # noqa: BLE001  it is the caller's to handle
            answer = True, error
        connection.send(answer)


@contextmanager
def guarded(
    function: F, factory: Callable[[], Callable[..., Any]], careful_sec: float | None
) -> Iterator[F | Careful]:
    """The function as it is; where a number of seconds is given, in a process of its own, with so many for
    each call.
    """
    if careful_sec is None:
        yield function
        return
    with Careful(factory, careful_sec) as careful:
        yield careful


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
