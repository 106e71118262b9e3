"""A process that holds a lock, for tests of whoever comes second."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_by(script: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process runs a script, which takes the lock, prints `held` and waits, for the length of the
    block.
    """
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()
