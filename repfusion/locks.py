"""One writer a place: a lock file that the kernel frees with its process, however that ends, and that says
whose it is.

flock, which Linux passes on to an NFS server, so that it holds between machines too; where a file system has
no locks, that is said, and nothing is kept out.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from repfusion.config import Strict

log = logging.getLogger(__name__)
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
RETRY_SEC = 0.5
JOB = "REPFUSION_JOB"
"""Environment variable of a cluster's job: its name."""


class Holder(Strict):
    """Who is at work in a place."""

    host: str
    pid: int
    since: str
    """UTC, to the second."""
    command: str
    numbering: str = ""
    """Whose process numbers these are: of this start of the machine, of this container."""
    job: str = ""
    """Name of the cluster's job that the process is; empty where it is none."""

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        program = Path(sys.argv[0])
        name = program.parent.name if program.name == "__main__.py" else program.name
        # a setting may hold a password
        command = " ".join([name, *(word for word in sys.argv[1:3] if "=" not in word and ":" not in word)])
        host, numbering = socket.gethostname(), _numbering()
        return cls(
            host=host,
            pid=os.getpid(),
            since=since,
            command=command,
            numbering=numbering,
            job=os.environ.get(JOB, ""),
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host} since {self.since} ({self.command}{job})"

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        if (self.host, self.numbering) != (socket.gethostname(), _numbering()):
            return False
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
        return _has_ended(self.pid)


def _has_ended(pid: int) -> bool:
    """Whether a process is over and only not yet waited for by its parent."""
    with suppress(OSError):  # other systems than Linux
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return False


def _numbering() -> str:
    found = ""
    with suppress(OSError):  # other systems than Linux
        found = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found += f" {os.readlink('/proc/self/ns/pid')}"
    return found


@contextmanager
def locked(
    path: Path, remedy: str, is_shared: bool = False, wait_sec: float = 0.0, place: Path | None = None
) -> Iterator[None]:
    """Holds the lock file `path` of a `place` (None: the folder it lies in) for the length of the block:
    alone, or with others that share it.

    Raises:
        ValueError: another process holds it, and did not let go of it within `wait_sec`. The message names it
            and ends with `remedy`.
    """
    end = time.monotonic() + wait_sec
    while (stream := _take(path, is_shared)) is None:
        if time.monotonic() >= end:
            raise ValueError(
                f"{place or path.parent}: another run is at work here: {_holders(path)}; wait for it, or "
                f"{remedy}"
            )
        time.sleep(RETRY_SEC)
    with stream:
        yield


def take(path: Path) -> IO[str] | None:
    """The lock file `path`, held alone for as long as the stream is open; None where another has it."""
    return _take(path, is_shared=False)


def _take(path: Path, is_shared: bool) -> IO[str] | None:
    """The locked file, open; None where another process has it."""
    stream = _open(path, is_shared)
    if stream is None:
        return open(os.devnull)
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            raise BlockingIOError  # it was deleted, and another file has its name
    except (BlockingIOError, FileNotFoundError):
        stream.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            stream.close()
            raise
        log.warning("%s: this file system has no locks (%s): see that one run at a time is here", path, error)
    if stream.writable():
        if not is_shared:
            stream.truncate(0)
        stream.write(json.dumps(Holder.here().model_dump()) + "\n")
        stream.flush()
    return stream


def _open(path: Path, is_shared: bool) -> IO[str] | None:
    """The lock file; None where a reader may not write, and there is no lock file to hold."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError as error:
        if not is_shared or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    with suppress(FileNotFoundError):
        return path.open("r")
    return None


def at_work(path: Path) -> list[Holder]:
    """Who holds a lock file now, as far as they name themselves. One that is free is held, shared, for the
    moment of looking.
    """
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return []
    except BlockingIOError:
        return _named(path)
    except OSError:
        return []


def _holders(path: Path) -> str:
    """Who wrote into the lock file and may still be there."""
    return ", ".join(map(str, _named(path))) or f"a process that {path} does not name"


def _named(path: Path) -> list[Holder]:
    found: list[Holder] = []
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                holder = Holder.model_validate_json(line)
                found += [] if holder.is_gone else [holder]
    return found
