"""Inputs one after the other into readers, in a process that may be lost; what goes wrong is kept."""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from repfusion.files import bytes_sha256

INPUT_SEC = 20.0
"""How long one input may take."""
MAX_GROWTH_BYTES = 600 << 20
"""By how much one input may raise the most memory that the process has held."""
MAX_ADDRESS_BYTES = 4 << 30
"""What the process may reserve beyond what its libraries do."""
MAX_FILES = 256
MAX_FINDINGS = 20
"""After so many, somebody has to look at them first."""
START_SEC = 120.0
POLL_SEC = 0.05


@dataclass(frozen=True)
class Finding:
    """An input that did what none may do."""

    path: Path
    text: str


@dataclass
class Findings:
    """What came of a drive."""

    tried: Counter[str] = field(default_factory=Counter)
    """Inputs by target."""
    findings: list[Finding] = field(default_factory=list)


def save(out: Path, target: str, data: bytes, text: str) -> Finding:
    """Keeps an input as a case."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{target}-{bytes_sha256(data)[:12]}.bin"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(text)
    return Finding(path, text.strip().splitlines()[-1])


def drive(
    targets: list[str], seed: int, seconds: float, out: Path, max_findings: int = MAX_FINDINGS
) -> Findings:
    """Tries random inputs for a while. A process that an input ends is a finding, and another takes over."""
    found, number, end = Findings(), 0, time.monotonic() + seconds
    while time.monotonic() < end and len(found.findings) < max_findings:
        with tempfile.TemporaryDirectory() as scratch:
            state = Path(scratch)
            command = [
                sys.executable,
                "-m",
                "tests.fuzz.drive",
                json.dumps([targets, seed, number, str(out)]),
            ]
            with subprocess.Popen([*command, scratch], stdin=subprocess.DEVNULL) as child:
                reason = _watch(child, state, end)
                child.kill()
            lines = (state / "tried").read_text().splitlines() if (state / "tried").exists() else []
            number += len(lines)
            found.tried.update(lines)
            found.findings += [
                Finding(Path(path), text) for path, text in map(json.loads, _lines(state / "findings"))
            ]
            if reason:
                target = (state / "target").read_text() if (state / "target").exists() else "start"
                data = (state / "input").read_bytes() if (state / "input").exists() else b""
                found.findings.append(save(out, target, data, reason))
                number += 1
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _watch(child: "subprocess.Popen[bytes]", state: Path, end: float) -> str | None:
    """Waits for the end; what an input did to the process, if it did."""
    patience, since = START_SEC, time.monotonic()
    seen = None
    while time.monotonic() < end:
        if child.poll() is not None:
            return f"the process ended with status {child.returncode}"
        now = (state / "input").stat().st_mtime_ns if (state / "input").exists() else None
        if now != seen:
            seen, since, patience = now, time.monotonic(), INPUT_SEC
        elif time.monotonic() - since > patience:
            return f"took longer than {patience:g} s"
        time.sleep(POLL_SEC)
    return None


def attempt(target: str, data: bytes, scratch: Path) -> str | None:
    """Reads one input; what it did that none may do."""
    from tests.fuzz.targets import TARGETS

    before, files = _peak_bytes(), _num_files()
    start = time.monotonic()
    try:
        TARGETS[target].read(data, scratch)
    except ValueError as error:
        if not str(error).strip():
            return f"{traceback.format_exc()}\nan error without a text: {type(error).__name__}"
    except BaseException as error:  # noqa: BLE001  whatever it is, it is what is looked for
        return f"{traceback.format_exc()}\n{type(error).__name__}: {error}"
    if time.monotonic() - start > INPUT_SEC:
        return f"took {time.monotonic() - start:.0f} s"
    if (grown := _peak_bytes() - before) > MAX_GROWTH_BYTES:
        return f"took {grown:,} bytes of memory"
    gc.collect()
    if (left := _num_files() - files) > 0:
        return f"left {left} files open"
    return None


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _num_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _limit_process() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_ADDRESS_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(targets: list[str], seed: int, number: int, out: Path, state: Path) -> None:
    from tests.fuzz.targets import TARGETS

    for name in targets:
        # imports and caches are no input's fault
        attempt(name, TARGETS[name].seed(Random(0)), state / "scratch")
    _limit_process()
    known: set[str] = set()
    while True:
        random = Random(f"{seed}/{number}")
        name = random.choice(targets)
        data = TARGETS[name].make(random)
        (state / "target").write_text(name)
        (state / "input").write_bytes(data)
        if (text := attempt(name, data, state / "scratch")) is not None:
            kind = "\n".join(line for line in text.splitlines() if line.startswith("  File")) or text
            if kind not in known:
                known.add(kind)
                finding = save(out, name, data, text)
                with (state / "findings").open("a") as stream:
                    stream.write(json.dumps([str(finding.path), finding.text]) + "\n")
        with (state / "tried").open("a") as stream:
            stream.write(f"{name}\n")
        number += 1


if __name__ == "__main__":
    _targets, _seed, _number, _out = json.loads(sys.argv[1])
    _child(_targets, _seed, _number, Path(_out), Path(sys.argv[2]))
