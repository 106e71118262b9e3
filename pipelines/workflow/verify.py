"""Every byte of the data stages read again; what is broken goes into quarantine and is made anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.dag import ShardStage, Stage
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards
from pipelines.runtime.session import RayConfig, ray_session
from pipelines.shards.manifest import MANIFEST, SHARDS
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples
from pipelines.workflow.inspection import State, read_sidecars, states
from pipelines.workflow.locks import DataLocks, locked_roots
from pipelines.workflow.run import run
from repfusion.files import file_sha256

QUARANTINE = "quarantine"
"""Folder of a stage to which broken shards are moved, for whoever wants to know what happened to them."""


@dataclass(frozen=True)
class Broken:
    """A shard, or a file of a stage as a whole, that is not what was written."""

    stage: str
    name: str
    problem: str
    files: tuple[str, ...]
    """All of its files, which leave together."""


class VerifyWorker:
    """Compares one shard's files with the sidecar that its job carries; returns what is wrong."""

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, job: ShardJob) -> str | None:
        expected = Sidecar.model_validate(job.arguments["sidecar"])
        found = read_sidecar(self.folder, job.name)
        if found is None:
            return f"{job.name}.json is missing or not readable"
        if found != expected:
            return f"{job.name}.json is not the sidecar that the manifest lists"
        if expected.file.endswith(".tar"):
            try:
                number = sum(1 for _ in read_samples(self.folder, expected.file, expected))
            except ShardError as error:
                return str(error)
            if number != expected.samples:
                return f"{expected.file} holds {number} samples, its sidecar says {expected.samples}"
        elif problem := wrong_bytes(self.folder, expected.file, expected.bytes, expected.sha256):
            return problem
        for name, file in expected.files.items():
            if problem := wrong_bytes(self.folder, name, file.bytes, file.sha256):
                return problem
        return None


def wrong_bytes(folder: Folder, name: str, num_bytes: int, sha256: str) -> str | None:
    """What is wrong with a file of known size and hash, or None."""
    try:
        with folder.local_copy(name) as path:
            if (size := path.stat().st_size) != num_bytes:
                return f"{name}: {size:,} bytes, expected {num_bytes:,}"
            if file_sha256(path) != sha256:
                return f"{name}: its bytes changed since it was written (another sha256)"
    except FileNotFoundError:
        return f"{name}: no such file"
    return None


def find_broken(stage: ShardStage, state: State, pool: ActorPool, actors: ActorsConfig) -> list[Broken]:
    """Reads what a stage has complete, on the pool. Where the table of its shards is not the one that was
    written, the sidecars say what is expected.
    """
    broken: list[Broken] = []
    if state.output is None:
        shards = state.kept
    elif state.output.shards.digest == state.output.manifest.shards_digest:
        shards = tuple(state.output.shards)
    else:
        problem = f"{SHARDS}: its content changed since it was written (not the manifest's shards_digest)"
        broken.append(Broken(stage.name, SHARDS, problem, (MANIFEST, SHARDS)))
        sidecars = read_sidecars(stage.folder, state.output.shards.names)
        shards = tuple(sidecars[name] for name in sorted(sidecars))
    jobs = [
        ShardJob(shard.name, stage.fingerprint, {}, {"sidecar": shard.model_dump(mode="json")})
        for shard in shards
    ]
    label = f"verify {stage.name}"
    problems = run_shards(pool, label, VerifyWorker, {"folder": stage.folder}, jobs, actors)
    broken += [
        Broken(stage.name, shard.name, problem, (f"{shard.name}.json", shard.file, *shard.files))
        for shard in shards
        if (problem := problems[shard.name])
    ]
    whole = state.output.manifest.files if state.output is not None else {}
    for name, file in whole.items():
        if problem := wrong_bytes(stage.folder, name, file.bytes, file.sha256):
            broken.append(Broken(stage.name, name, problem, (name,)))
    return broken


def verify(
    stages: Sequence[Stage],
    root: Path,
    ray: RayConfig,
    repair: bool = True,
    say: Callable[[str], None] = print,
    pool: ActorPool | None = None,
) -> list[Broken]:
    """Checks every complete shard of the data stages; with `repair`, moves what is broken into quarantine and
    runs the stages that were fresh again, which makes just that anew. What was not complete before is left to
    `run`.

    Raises:
        StageError: where a shard could not be made again.
        ValueError: where another run holds the root.
    """
    data = [stage for stage in stages if isinstance(stage, ShardStage)]
    found: list[Broken] = []
    own = pool is None
    with ray_session(ray):
        pool = pool or ActorPool()
        try:
            with locked_roots(root), DataLocks(data) as lock:
                lock.write() if repair else lock.read()
                before = states(data)
                for stage in data:
                    state = before[stage.name]
                    if state.output is None and not state.kept:
                        say(f"{stage.name}: nothing to verify ({state.status})")
                        continue
                    broken = find_broken(stage, state, pool, ActorsConfig())
                    number = len(state.kept) if state.output is None else state.output.manifest.num_shards
                    say(f"{stage.name}: {number} shards read, {len(broken)} broken")
                    for one in broken:
                        say(f"  {one.stage}/{one.name}: {one.problem}")
                    found += broken
                if found and repair:
                    for one in found:
                        quarantine(next(stage.folder for stage in data if stage.name == one.stage), one)
            if found and repair:
                complete = [stage for stage in data if before[stage.name].status == "fresh"]
                results = run(complete, root, ray, say, pool)
                _compare(before, {result.name: result.output for result in results}, say)
        finally:
            if own:
                pool.close()
    return found


def quarantine(folder: Folder, broken: Broken) -> None:
    """Moves what is left of a broken shard aside; its sidecar goes first."""
    present = folder.names()
    for name in broken.files:
        if name in present:
            folder.move(name, folder / QUARANTINE)


def _compare(before: dict[str, State], after: dict[str, Any], say: Callable[[str], None]) -> None:
    """Says of each stage whether the data is as it was."""
    for name, output in after.items():
        old = before[name].output
        assert old is not None
        if old.manifest.digest == output.manifest.digest:
            say(f"{name}: as before, digest {output.manifest.digest[:12]}")
        else:
            say(
                f"{name}: the data changed, {old.manifest.digest[:12]} -> {output.manifest.digest[:12]}, as "
                "what it is made from did"
            )
