"""Processes that carry a cluster's mark in their environment: started apart, found again, and ended."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.config import ClusterError

MARK = "REPFUSION_CLUSTER"
"""Environment variable that every process of a cluster inherits."""
POLL_SEC = 0.2
EXEC_TRIES = 20
"""Looks at a process that has no variables."""
PF_KTHREAD = 0x0020_0000
"""Flag of the kernel's own threads, which never have any."""


def start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """The pid of a process that outlives this one, in a session of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    return process.pid


def marked(mark: str) -> dict[int, str]:
    """Living processes with a mark: pid -> command line."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in _environment_of(folder).split(b"\0"):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = b" ".join(words).decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def _environment_of(folder: Path) -> bytes:
    """Variables of a process: none where it is dead and only not yet waited for; while it becomes another
    program, they are none for a moment.
    """
    for _ in range(EXEC_TRIES):
        found = (folder / "environ").read_bytes()
        state, _, _, _, _, _, flags = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:7]
        if found or state in b"ZX" or int(flags) & PF_KTHREAD:
            return found
        time.sleep(0.005)
    return b""


def is_alive(pid: int, mark: str) -> bool:
    """Whether a process is still the one that was started: numbers are used again."""
    return pid in marked(mark)


def ask_to_end(pids: Sequence[int], mark: str, patience_sec: float) -> None:
    """SIGTERM to those that still carry the mark, then waits for them."""
    alive = marked(mark)
    for pid in pids:
        if pid in alive:
            _send(pid, signal.SIGTERM)
    wait_until(lambda: not set(pids) & marked(mark).keys(), patience_sec)


HELPERS_SEC = 5.0
"""Patience with helpers of processes that have ended: they see it by a pipe, and end by themselves."""


def end_rest(mark: str, helpers_sec: float = 0.0, patience_sec: float = 10.0) -> dict[int, str]:
    """SIGKILL to everything that carries the mark and does not end by itself; returns what was killed."""
    killed: dict[int, str] = {}
    wait_until(lambda: not marked(mark), helpers_sec)
    for _ in range(3):
        left = marked(mark)
        killed |= left
        for pid in left:
            _send(pid, signal.SIGKILL)
        if wait_until(lambda: not marked(mark), patience_sec / 3):
            break
    return killed


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], bool], patience_sec: float) -> bool:
    """Whether the condition came true in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > patience_sec:
            return False
        _reap()
        time.sleep(POLL_SEC)
    return True


def _reap() -> None:
    """Takes the end of children of this process, which else stay as dead entries."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def ports_of(wanted: Mapping[str, int | None]) -> list[int]:
    """Ports of loopback by what they are for, free ones where None is wanted; no two are the same.

    Raises:
        ClusterError: somebody listens on one of them.
    """
    with ExitStack() as held:
        # all are held until the last is found: the kernel gives one that was let go to the next who asks
        servers = [held.enter_context(_listening(key, port)) for key, port in wanted.items()]
        return [server.getsockname()[1] for server in servers]


def _listening(key: str, port: int | None) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port or 0))
    except OSError as error:
        raise ClusterError(
            f"{key}: port {port} of 127.0.0.1 is taken ({error.strerror}); choose another, or leave it out "
            "for a free one"
        ) from error


def answers(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def tail(log: Path, lines: int = 8) -> str:
    """The end of a log, indented, for a message."""
    text = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"    {line}" for line in text[-lines:]) or "    (it said nothing)"
