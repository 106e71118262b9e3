"""Programs that tests start and wait for. Whatever comes, no process of theirs stays."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIMIT_SEC = 400
"""A busy machine is no hang."""
ENDING_SEC = 60
"""In which torchrun ends its ranks: half a minute passes before it kills those that do not listen."""


def torchrun(num_ranks: int, *arguments: str | Path) -> str:
    """What a program says on standard output that ran on so many ranks, one thread each.

    Raises:
        AssertionError: it failed, with the end of what it said.
        TimeoutExpired: it took too long. torchrun was asked to end then, and not killed: that would leave
            its ranks, which are in sessions of their own.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, *launch, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, complained = process.communicate(timeout=LIMIT_SEC)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=ENDING_SEC)
    assert process.returncode == 0, complained[-4000:]
    return said


def outputs(started: Sequence["subprocess.Popen[str]"]) -> list[str]:
    """What each has said on standard output by its end. Those that take too long are killed."""
    try:
        return [process.communicate(timeout=LIMIT_SEC)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
