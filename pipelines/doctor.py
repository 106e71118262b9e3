"""This machine, and the places of a workflow -> whether they serve; `python -m pipelines.doctor`."""

import argparse
import fcntl
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pipelines.config import WorkflowConfig
from pipelines.shards.storage import said_at
from repfusion.config import load_config, weights_of
from repfusion.display.redaction import redact_text
from repfusion.display.tables import aligned
from repfusion.display.terminal import printable_lines
from repfusion.lineage.environment import ROOT

Verdict = Literal["ok", "note", "wrong"]
GIB = 2**30
FREE_GIB, MEMORY_GIB, SHM_GIB = 5, 6, 0.25
"""Below these a demo may fail: free disk, memory, and shared memory, in which Ray keeps its objects."""
PORTS = {5000: "make mlflow (PORT=... takes another)", 8265: "Ray's dashboard (not needed)"}
TOKENS = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_ADDRESS",
)
"""Variables of the environment that decide who lets this process in, of which only the names are shown."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    """What is there, and what to do where that is wrong."""


def check_python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= (3, 11)
    yield Check("python", "ok" if is_new else "wrong", version if is_new else f"{version}; 3.11 is needed")
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    yield Check(
        "compiler", "ok" if found else "wrong", found or "none; DeepSpeed's optimizer needs a C++ compiler"
    )


def check_packages(lock: Path = ROOT / "requirements.lock") -> Iterator[Check]:
    """Installed versions beside those of the lock file, where there is one."""
    if not lock.is_file():
        yield Check("packages", "note", "no requirements.lock beside the code: versions are not compared")
        return
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", lock.read_text(), re.M))
    differing = []
    for name, wanted in pinned.items():
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            version = "none"
        if version != wanted:
            differing.append(f"{name} {version}, the lock has {wanted}")
    said = f"{len(pinned)} as in requirements.lock"
    if differing:
        named = "; ".join(differing[:5])
        said = f"{len(differing)} of {len(pinned)} differ: {named}; 'make setup' installs them"
    yield Check("packages", "note" if differing else "ok", said)


def check_cores() -> Iterator[Check]:
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    limit = "" if quota is None else f", of which a control group allows {quota:g}"
    busy = os.getloadavg()[0]
    crowd = f"; load {busy:.1f}, others are at work here" if busy > cores else ""
    yield Check(
        "cores", "note" if crowd or min(cores, quota or cores) < 2 else "ok", f"{cores}{limit}{crowd}"
    )


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the control group allows; None where it sets no limit."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def check_memory() -> Iterator[Check]:
    text = Path("/proc/meminfo").read_text()
    total, free = (int(kib) / 2**20 for kib in re.findall(r"^Mem(?:Total|Available): +(\d+)", text, re.M))
    said = f"{total:.1f} GiB, {free:.1f} GiB of them free"
    is_little = free < MEMORY_GIB
    yield Check(
        "memory", "note" if is_little else "ok", said + (f"; a demo takes {MEMORY_GIB}" if is_little else "")
    )
    shared = shutil.disk_usage("/dev/shm").free / GIB
    is_little = shared < SHM_GIB
    remedy = "; ray.object_store_mib has to fit (a container: --shm-size)" if is_little else ""
    yield Check("/dev/shm", "note" if is_little else "ok", f"{shared:.2f} GiB free{remedy}")


def check_gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        what = "none; everything runs on the CPU"
        if built is not None:
            what = f"none, though torch is built for CUDA {built}: no driver, or no device is let in"
        yield Check("GPUs", "note" if built else "ok", what)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Check(f"GPU {number}", "ok", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    is_there = torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if is_there else "not in this torch"
    yield Check("NCCL", "ok" if is_there else "wrong", version)


def check_place(name: str, folder: Path) -> Iterator[Check]:
    """Free disk, whether files can be written and locked, of the nearest folder that is there."""
    there = next(one for one in (folder.resolve(), *folder.resolve().parents) if one.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield Check(name, "wrong", f"{there}: {error.strerror}; files have to be written and locked there")
        return
    free = shutil.disk_usage(there).free / GIB
    is_little, kind = free < FREE_GIB, file_system(there)
    said = f"{there}: {free:.1f} GiB free, {kind}, can be written and locked"
    yield Check(name, "note" if is_little else "ok", said)


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """What kind of file system a folder lies on, such as `ext4` or `nfs4`."""
    found, longest = "unknown", ""
    for line in mounts.read_text().splitlines():
        _, place, kind, *_ = line.split()
        if len(place) >= len(longest) and folder.is_relative_to(place):
            found, longest = kind, place
    return found


def check_ports() -> Iterator[Check]:
    for port, what in PORTS.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            yield Check(f"port {port}", "note", f"taken; {what}")
        else:
            yield Check(f"port {port}", "ok", f"free, for {what}")


def check_tokens() -> Iterator[Check]:
    there = [name for name in TOKENS if os.environ.get(name)]
    yield Check(
        "tokens", "ok", f"in the environment: {', '.join(there) or 'none'}; nothing is downloaded at run time"
    )


def check_workflow(path: Path) -> Iterator[Check]:
    """The places of a workflow: its root, its data folder, its folders of weights."""
    config = load_config(WorkflowConfig, path)
    yield from check_place("root", config.root)
    if config.data_url is not None:
        try:
            with said_at(config.data_url):
                names = config.data_folder.folders()
        except ValueError as error:
            yield Check("data_url", "wrong", str(error))
        else:
            yield Check("data_url", "ok", f"{config.data_url}: answers, {len(names)} folders")
    for key, folder in weights_of(config).items():
        is_there = folder.is_dir() or str(folder).startswith("stage:")
        if not is_there:
            yield Check(key, "wrong", f"{folder} is no folder")


def examine(workflow: Path | None) -> Iterator[Check]:
    """All checks, nearest things first."""
    parts: list[Callable[[], Iterator[Check]]] = [
        check_python,
        check_packages,
        check_cores,
        check_memory,
        check_gpus,
        check_ports,
        check_tokens,
    ]
    for part in parts:
        yield from part()
    yield from check_place("runs", Path("runs")) if workflow is None else check_workflow(workflow)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.doctor", description=__doc__)
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.yaml", help="a workflow to look at too"
    )
    args = parser.parse_args()
    try:
        found = list(examine(args.config))
    except (ValueError, OSError) as error:
        print(printable_lines(redact_text(f"error: {error}")), file=sys.stderr)
        return 1
    rows = [(one.name, one.verdict, one.found) for one in found]
    print(printable_lines(redact_text(aligned(rows, left=(0, 1, 2)))))
    wrong = [one.name for one in found if one.verdict == "wrong"]
    print(f"to mend: {', '.join(wrong)}" if wrong else "ready")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
