"""A data workflow in a process of its own, killed at a chosen moment, and what it leaves: files, processes,
sockets.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from repfusion.files import TEMPORARY

TAG = "REPFUSION_RUN"
"""Environment variable that marks all processes of a run: children inherit it."""
MACHINE_FILES = {".lock", "config.yaml", "digests.json", "summary.json"}
"""Of a workflow's root: they name times and places."""
POLL_SEC = 0.05
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel writes them."""
Target = Literal["driver", "actor", "raylet"]


def tagged(tag: str) -> dict[int, list[str]]:
    """Living processes that inherited a tag beginning so: pid -> command line."""
    found, wanted = {}, f"{TAG}={tag}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # empty where the process is dead and only not yet waited for
            if any(one.startswith(wanted) for one in (folder / "environ").read_bytes().split(b"\0")):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = [word.decode() for word in words if word]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def parent_of(pid: int) -> int | None:
    try:
        # after the name in parentheses, which may hold anything: state, parent
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def raylets_of(driver: int, tag: str) -> list[int]:
    """The raylet that a driver has started."""
    return [
        pid
        for pid, words in tagged(tag).items()
        if words and words[0].endswith("/raylet") and parent_of(pid) == driver
    ]


def actors_of(driver: int, tag: str) -> list[int]:
    """The actors of a driver's own Ray that hold a shard worker, by age."""
    raylets = raylets_of(driver, tag)
    return sorted(
        pid
        for pid, words in tagged(tag).items()
        if words and words[0].startswith("ray::_ShardActor") and parent_of(pid) in raylets
    )


def listening_sockets(pids: Sequence[int]) -> set[str]:
    """Inodes of the TCP sockets on which processes listen."""
    listening = _all_listening()
    found: set[str] = set()
    for pid in pids:
        try:
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                name = os.readlink(handle)
                if name.startswith("socket:[") and name[8:-1] in listening:
                    found.add(name[8:-1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def listening_addresses(pids: Sequence[int]) -> set[str]:
    """Addresses on which processes listen, as the kernel writes them, such as those of LOOPBACK."""
    own = listening_sockets(pids)
    return {words[1].partition(":")[0] for words in _listening_lines() if words[9] in own}


def _all_listening() -> set[str]:
    return {words[9] for words in _listening_lines()}


def _listening_lines() -> list[list[str]]:
    """Words of the kernel's lines about TCP sockets that listen."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        if (path := Path("/proc/net") / name).is_file()
        for line in path.read_text().splitlines()[1:]
    ]
    return [words for words in lines if words[3] == "0A"]


def still_listening(sockets: set[str], patience_sec: float = 5.0) -> set[str]:
    """Those of the sockets that stay; a process that ends loses its environment before its sockets."""
    start = time.monotonic()
    while (left := sockets & _all_listening()) and time.monotonic() - start < patience_sec:
        time.sleep(POLL_SEC)
    return left


def wait_until_gone(tag: str, patience_sec: float = 90.0) -> float:
    """Seconds until no process of a tag is alive. Raises TimeoutError, naming those that stay."""
    start = time.monotonic()
    while alive := tagged(tag):
        if time.monotonic() - start > patience_sec:
            commands = "; ".join(f"{pid} {' '.join(words)[:80]}" for pid, words in alive.items())
            raise TimeoutError(f"after {patience_sec:g} s still alive: {commands}")
        time.sleep(POLL_SEC)
    return time.monotonic() - start


def end_tagged(tag: str) -> None:
    """Kills what is left of a run, for the sake of the next one."""
    for pid in tagged(tag):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@contextmanager
def tagged_process(
    command: Sequence[str], tag: str, log: Path, environment: Mapping[str, str] = {}
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, its output appended to `log`, with the tag and one compute thread.
    Ray's session folder lies in a short-named folder that goes with the block, as do processes that are left.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder, **environment, TAG: tag}
    variables.pop("RAY_ADDRESS", None)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
            # a shell's background jobs ignore Ctrl-C, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            end_tagged(tag)
        shutil.rmtree(folder, ignore_errors=True)


def run_command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", str(config), *overrides]


def stage_at_work(root: Path) -> str:
    """The latest stage that has started and is not complete; `-` where none is."""
    started = sorted(root.glob("*/stage.json"), key=lambda path: path.stat().st_mtime_ns)
    open_stages = [path.parent.name for path in started if not (path.parent / "manifest.json").exists()]
    return open_stages[-1] if open_stages else "-"


def contents(root: Path) -> dict[str, Any]:
    """Every file of a workflow's root, by path: its bytes, or what it says without seconds and versions."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir() or name in MACHINE_FILES or path.suffix == ".lock":
            continue
        data = path.read_bytes()
        if path.name == "shards.parquet":
            table = pq.read_table(io.BytesIO(data)).drop_columns(["seconds", "versions"])
            found[name] = table.to_pylist()
        elif path.suffix == ".json":
            values = json.loads(data)
            for field_name in ("seconds", "shard_seconds", "versions"):
                values.pop(field_name, None)
            found[name] = values
        else:
            found[name] = data
    return found


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What of two roots' contents is not the same, in words."""
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    more = [f"{name} is left over" for name in found.keys() - expected.keys()]
    other = [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return sorted(missing + more + other)


def temporaries(root: Path) -> list[str]:
    """Files and folders half-written."""
    return [str(path.relative_to(root)) for path in root.rglob(f"*{TEMPORARY}")]


@dataclass(frozen=True, order=True)
class Moment:
    """By progress and not by time, so that it is the same one on a busy machine."""

    num_complete: int
    """Sidecars in place, of all stages."""
    delay_sec: float
    """From then on, so that shards are in flight."""


@dataclass
class Attempt:
    """One process of a round."""

    killed: Target | None
    """What was killed; None where the run was left alone, or over before the moment came."""
    at_sec: float | None
    """When, from the start of the process."""
    stage: str
    """At work then."""
    num_complete: int
    """Sidecars that were in place then, of all stages."""
    exit_code: int
    seconds: float


@dataclass
class Round:
    """Attempts until one ends well, and what is wrong with the result."""

    attempts: list[Attempt] = field(default_factory=list)
    lingered_sec: float = 0.0
    """Longest time that a process outlived its driver."""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reference(
    config: Path, root: Path, log: Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], float]:
    """Contents of an uninterrupted run, and its seconds. Raises RuntimeError where it fails."""
    start = time.monotonic()
    command = run_command(config, f"root={root}", *overrides)
    with tagged_process(command, f"{os.getpid()}-reference", log) as process:
        exit_code = process.wait(600)
    if exit_code or temporaries(root):
        raise RuntimeError(f"the reference run ended with {exit_code}: {log.read_text()[-2000:]}")
    return contents(root), time.monotonic() - start


def run_round(
    config: Path,
    root: Path,
    expected: Mapping[str, Any],
    rng: random.Random,
    targets: Sequence[Target] = ("driver", "actor", "raylet"),
    overrides: Sequence[str] = (),
    limit_sec: float = 600,
) -> Round:
    """Runs a workflow on a fresh root, kills one of its processes at a random moment (half of the time again,
    later, in the next attempt), runs it until it ends well, and compares.

    After a death, half of the rounds start again at once, while Ray's processes may still be going down.
    """
    done = Round()
    tag = f"{os.getpid()}-{root.name}"
    log, command = root.with_suffix(".log"), run_command(config, f"root={root}", *overrides)
    waits, target = rng.random() < 0.5, rng.choice(targets)
    total = sum(name.endswith(".json") and name.rpartition("/")[2][0].isdigit() for name in expected)
    moments = sorted(
        Moment(rng.randrange(int(0.9 * total)), rng.uniform(0, 1)) for _ in range(rng.choice([1, 2]))
    )
    while True:
        index = len(done.attempts)
        moment = moments[index] if index < len(moments) else None
        with tagged_process(command, f"{tag}-{index}", log) as process:
            try:
                attempt, sockets = _attempt(process, f"{tag}-{index}", root, target, moment, rng, limit_sec)
            except subprocess.TimeoutExpired:
                done.problems.append(f"attempt {index} hung: not over after {limit_sec:g} s")
                return done
            done.attempts.append(attempt)
            if waits or attempt.exit_code == 0:
                _check_gone(done, tag, sockets)
        if attempt.exit_code == 0:
            break
        if attempt.killed in (None, "actor"):
            done.problems.append(f"attempt {index} ended with {attempt.exit_code} without its driver's death")
            if attempt.killed is None:
                return done
    done.problems += differences(expected, contents(root))
    done.problems += [f"{name} is a temporary left over" for name in temporaries(root)]
    return done


def _attempt(
    process: subprocess.Popen[bytes],
    tag: str,
    root: Path,
    target: Target,
    moment: "Moment | None",
    rng: random.Random,
    limit_sec: float,
) -> tuple[Attempt, set[str]]:
    """Waits for the end; at the moment, or once the target is there, kills it. Also the sockets that the
    run's processes listened on.
    """
    start = time.monotonic()
    find: dict[Target, Callable[[int, str], list[int]]] = {
        "driver": lambda pid, tag: [pid],
        "actor": actors_of,
        "raylet": raylets_of,
    }
    killed, at_sec, stage, num_complete = None, None, "-", 0
    due: float | None = None
    sockets: set[str] = set()
    while process.poll() is None:
        passed = time.monotonic() - start
        if passed > limit_sec:
            raise subprocess.TimeoutExpired(process.args, limit_sec)
        if moment is not None and killed is None:
            num_complete = len(list(root.glob("*/[0-9]*.json")))
            if due is None and num_complete >= moment.num_complete:
                due = passed + moment.delay_sec
            victims = find[target](process.pid, tag) if due is not None and passed >= due else []
            if victims:
                sockets = listening_sockets(list(tagged(tag)))
                stage, victim = stage_at_work(root), rng.choice(victims)
                if process.poll() is None:
                    os.kill(victim, signal.SIGKILL)
                    killed, at_sec = target, round(passed, 1)
        time.sleep(POLL_SEC)
    seconds = round(time.monotonic() - start, 1)
    return Attempt(killed, at_sec, stage, num_complete, process.returncode, seconds), sockets


def _check_gone(done: Round, tag: str, sockets: set[str]) -> None:
    try:
        done.lingered_sec = max(done.lingered_sec, round(wait_until_gone(tag), 1))
    except TimeoutError as error:
        done.problems.append(str(error))
        end_tagged(tag)
    if left := still_listening(sockets):
        done.problems.append(f"{len(left)} sockets still listen")
