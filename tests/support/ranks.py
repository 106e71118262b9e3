"""Trainings on several ranks for the tests: `python tests/support/ranks.py` imports everything once and
forks the ranks of each job, which is far quicker than torchrun.

A job is a line of JSON on standard input, its answer a line on standard output: how each rank ended.
"""

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    config: str
    """TrainConfig as JSON."""
    world_size: int = 1
    log: str = ""
    """Folder for what each rank says and reads: RANK.log, RANK.keys."""
    kill_rank: int | None = None
    kill_at_step: int | None = None
    """SIGKILL that rank when it has read the batch of this step."""
    stop_at_step: int | None = None
    """SIGTERM to the last rank at that moment."""
    kill_in_save: str | None = None
    """SIGKILL rank 0 where it comes to this function of `snapshot`..."""
    kill_at_call: int = 2
    """... for the n-th time."""
    kill_in_upload: int | None = None
    """SIGKILL rank 0 where it comes to upload its n-th file."""
    folders: tuple[str, ...] = ()
    """Working directory of each rank."""
    file_limit: tuple[int, int] | None = None
    """(step, bytes): from that step on rank 0 can write no file beyond so many bytes, as on a full disk."""


def killing(function: Callable[..., Any], at_call: int) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def kill_in_upload(at_file: int) -> None:
    from s3fs import S3FileSystem

    counted = killing(S3FileSystem._put_file, at_file)

    async def put_file(*args: Any, **kwargs: Any) -> None:
        await counted(*args, **kwargs)

    S3FileSystem._put_file = put_file


def run_rank(job: Job, rank: int, port: int) -> None:
    """In a child: one rank of a training, as torchrun would start it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if job.folders:
        os.chdir(job.folders[rank])
    folder = Path(job.log)
    log = (folder / f"{rank}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    from repfusion import train as training
    from repfusion.training import snapshot

    if job.kill_in_save is not None and rank == 0:
        setattr(snapshot, job.kill_in_save, killing(getattr(snapshot, job.kill_in_save), job.kill_at_call))
    if job.kill_in_upload is not None and rank == 0:
        kill_in_upload(job.kill_in_upload)
    batches = training.batches

    def recorded(*args: Any, **kwargs: Any) -> Iterator[Any]:
        first = kwargs["first_step"]
        with (folder / f"{rank}.keys").open("a") as keys:
            for step, parts in enumerate(batches(*args, **kwargs), first):
                for part in parts:
                    keys.write("".join(f"{step} {key}\n" for key in part.keys))
                keys.flush()
                if step == job.kill_at_step and rank == job.kill_rank:
                    os.kill(os.getpid(), signal.SIGKILL)
                if job.file_limit and step == job.file_limit[0] and rank == 0:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit[1], resource.RLIM_INFINITY))
                if step == job.stop_at_step and rank == job.world_size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield parts

    training.batches = recorded
    path = folder / f"{rank}.yaml"
    path.write_text(job.config)
    logging.basicConfig(level=logging.INFO)
    sys.argv = ["repfusion.train", str(path)]
    training.main()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print
    from repfusion.training.distributed import prepare_environment

    prepare_environment()
    import deepspeed  # noqa: F401

    import repfusion.train  # noqa: F401

    for line in sys.stdin:
        job = Job(**json.loads(line))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        children: dict[int, int] = {}
        for rank in range(job.world_size):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    run_rank(job, rank, port)
                    status = 0
                except SystemExit as ended:
                    status = ended.code if isinstance(ended.code, int) else 1
                except (ValueError, RuntimeError, OSError):
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            children[pid] = rank
        codes: dict[int, int] = {}
        while children:
            pid, status = os.wait()
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(code < 0 for code in codes.values()):
                for other in children:  # as a launcher does: the others wait for the dead one
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[rank] for rank in sorted(codes)]), file=answers, flush=True)


class Ranks:
    """The other end of `serve`."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def run(self, job: Job) -> list[int]:
        """Exit status of each rank."""
        Path(job.log).mkdir(parents=True, exist_ok=True)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def keys_read(folder: Path) -> list[tuple[int, str]]:
    """(step, key) of every sample that any rank of the jobs with this log read."""
    lines = [
        line.split(maxsplit=1) for path in folder.glob("*.keys") for line in path.read_text().splitlines()
    ]
    return sorted((int(step), key) for step, key in lines)


@contextmanager
def rank_server() -> Iterator[Ranks]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    try:
        yield Ranks(process)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait(60)


if __name__ == "__main__":
    serve()
