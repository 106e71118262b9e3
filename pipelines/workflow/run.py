"""A DAG of stages brought up to date: each shard once, whatever was interrupted, and nothing that is fresh
again.

A stage's state is plain files: `stage.json` (what was asked for, written at the start), shards with sidecars,
`shards.parquet` and `manifest.json` (written when all is complete).
"""

import glob
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.dag import ShardStage, Stage, WholeStage
from pipelines.runtime.pool import ActorPool, run_shards
from pipelines.runtime.session import RayConfig, StageError, ray_session
from pipelines.shards.manifest import (
    MANIFEST,
    SHARDS,
    Manifest,
    ShardTable,
    StageOutput,
    Upstream,
    write_output,
)
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA, Sidecar, SideFile, read_sidecar
from pipelines.workflow.flow import Flow
from pipelines.workflow.inspection import (
    STAGE,
    STALE,
    State,
    contents,
    inspect,
    is_training,
    read_asked,
    states,
    wrong_files,
)
from pipelines.workflow.locks import DataLocks, locked_roots
from repfusion.files import file_sha256, json_bytes
from repfusion.runs.folder import set_aside

Redo = Mapping[str, Mapping[str, dict[str, Any]]]
"""Shards to make again though they are complete: by stage and shard, further arguments of their jobs."""
NUM_PASSES = 3
"""How often the shards of a stage are tried that were gone from disk when the stage ended."""


@dataclass(frozen=True)
class StageResult:
    """One line of the summary."""

    name: str
    skipped: bool
    output: StageOutput

    @property
    def manifest(self) -> Manifest:
        return self.output.manifest


def run(
    stages: Sequence[Stage],
    root: Path,
    ray: RayConfig,
    say: Callable[[str], None] = print,
    pool: ActorPool | None = None,
    redo: Redo = {},  # noqa: B006  never written to
    overlap: bool = False,
) -> list[StageResult]:
    """Brings every stage up to date, in order; Ray starts only when there is something to do for it. A `pool`
    that is given is kept warm for the next run. With `overlap`, shards go on to the next stages while others
    are still made.

    Raises:
        StageError: where shards failed; the stage's other shards are complete.
        ValueError: where another run holds the root, or is at work on the same data; before any stage runs,
            where one cannot run with the models that it is given.
    """
    results: list[StageResult] = []
    above: dict[str, StageOutput] = {}
    owns_pool, workflow = pool is None, root.resolve().name
    flow: Flow | None = None
    with locked_roots(root), DataLocks(stages) as data, ExitStack() as session:
        pool = pool or ActorPool()
        data.read()
        before = states(stages)
        # what a stage at the end cannot run with is said before hours of others
        for stage in stages:
            if before[stage.name].status != "fresh" or stage.name in redo:
                stage.check()
        while new := to_make(stages, before, redo) - data.written:
            data.write(new | data.written)
            before = states(stages)  # others may have been here in between
        for number, stage in enumerate(stages):
            nothing_ran = all(result.skipped for result in results)
            again, ahead = redo.get(stage.name, {}), None
            if flow is not None and isinstance(stage, ShardStage):
                ahead = flow.advance(stage)
            state = ahead or (before[stage.name] if nothing_ran else inspect(stage, above))
            if data.written and isinstance(stage, WholeStage):
                data.read()  # a training takes days; others may read what it reads
            if state.status in ("stale", "missing") and isinstance(stage, WholeStage):
                state = exchange(stage, state, above, say)
            if state.status == "fresh" and (not again or flow is not None):
                assert state.output is not None
                output = state.output
                say(f"{stage.name}: fresh, skipped ({contents(output.manifest)})")
            else:
                if state.reason and state.status != "missing":
                    say(f"{stage.name}: {state.status}: {state.reason}")
                if not isinstance(stage, WholeStage) or stage.needs_ray:
                    session.enter_context(ray_session(ray))
                    if owns_pool:
                        session.callback(pool.close)
                if isinstance(stage, WholeStage):
                    # its own workers need the CPUs
                    pool.close()
                elif overlap and flow is None:
                    left = [one for one in stages[number:] if isinstance(one, ShardStage)]
                    flow = session.enter_context(Flow(left, above, pool, redo, workflow, _begin))
                    ahead = flow.advance(stage)
                began = time.perf_counter() if ahead is None or flow is None else flow.started
                again = again if ahead is None else {}
                output = _bring_up_to_date(stage, ahead or state, above, pool, again, workflow, began)
                say(f"{stage.name}: {contents(output.manifest)} in {output.manifest.seconds:.1f} s")
            above[stage.name] = output
            if flow is not None:
                flow.ended(output)
            results.append(StageResult(stage.name, state.status == "fresh" and not again, output))
    return results


def to_make(stages: Sequence[Stage], found: Mapping[str, State], redo: Redo) -> set[str]:
    """Names of the data stages that are not as they should be, and of those made from them."""
    names: set[str] = set()
    for stage in stages:
        is_new = found[stage.name].status != "fresh" or stage.name in redo
        if isinstance(stage, ShardStage) and (is_new or any(one.name in names for one in stage.upstream)):
            names.add(stage.name)
    return names


def _bring_up_to_date(
    stage: Stage,
    state: State,
    above: Upstream,
    pool: ActorPool,
    redo: Mapping[str, dict[str, Any]],
    workflow: str,
    began: float,
) -> StageOutput:
    # read before its manifest goes
    is_whole = isinstance(stage, WholeStage)
    kept = state.kept if is_whole or state.output is None else tuple(state.output.shards)
    _begin(stage, above)
    shards, names = ShardTable.of([]), []
    extra: dict[str, Any] = {}
    match stage:
        case ShardStage():
            shards = _run_shards(stage, state, kept, above, pool, redo, workflow)
            names = stage.finish(stage.folder, shards)
        case WholeStage():
            extra = stage.execute(above)
            extra |= {
                "upstream_digests": {one.name: above[one.name].manifest.digest for one in stage.upstream}
            }
    return complete(stage, shards, names, above, time.perf_counter() - began, extra)


def complete(
    stage: Stage,
    shards: ShardTable,
    names: Sequence[str],
    above: Upstream,
    seconds: float,
    extra: dict[str, Any] = {},  # noqa: B006  never written to
) -> StageOutput:
    """Writes the manifest of a stage whose shards and files (`names`) are in place."""
    files = {name: _side_file(stage.folder, name) for name in names}
    manifest = Manifest(
        stage=stage.name,
        fingerprint=stage.fingerprint,
        fields=stage.shown,
        upstream={one.name: one.fingerprint for one in stage.upstream},
        lineage=stage.lineage,
        num_shards=len(shards),
        samples=shards.samples,
        bytes=shards.bytes + sum(file.bytes for file in files.values()),
        shards_digest=shards.digest,
        drops=shards.drops,
        seconds=round(seconds, 3),
        shard_seconds=round(sum(shards.column("seconds")), 3),
        files=files,
        extra=extra,
    )
    return write_output(stage.folder, manifest, shards)


def _begin(stage: Stage, above: Upstream) -> None:
    """Says in a stage's folder what is asked for. Its manifest goes: nobody downstream is to mistake a stage
    at work for a complete one.
    """
    stage.folder.remove(MANIFEST)
    if isinstance(stage, WholeStage):
        stage.folder.path.mkdir(parents=True, exist_ok=True)
    stage.folder.remove_temporaries()
    stage.folder.write(STAGE, json_bytes(_asked(stage, above)))


def _asked(stage: Stage, above: Upstream) -> dict[str, Any]:
    asked = {
        "schema": SCHEMA,
        "fingerprint": stage.fingerprint,
        "fields": stage.shown,
        "lineage": stage.lineage,
    }
    if isinstance(stage, WholeStage):
        asked["upstream_digests"] = {one.name: above[one.name].manifest.digest for one in stage.upstream}
    return asked


def _side_file(folder: Folder, name: str) -> SideFile:
    with folder.local_copy(name) as path:
        return SideFile(bytes=path.stat().st_size, sha256=file_sha256(path))


def _run_shards(
    stage: ShardStage,
    state: State,
    kept: Sequence[Sidecar],
    above: Upstream,
    pool: ActorPool,
    redo: Mapping[str, dict[str, Any]],
    workflow: str,
) -> ShardTable:
    names = stage.shard_names(above)
    todo = set(names) if state.todo is None else set(state.todo) | set(redo)
    complete: dict[str, Sidecar] = {sidecar.name: sidecar for sidecar in kept if sidecar.name not in todo}
    for _ in range(NUM_PASSES):
        if not todo:
            break
        with stage.surround() as more:
            arguments = {"folder": stage.folder, **stage.arguments, **more}
            jobs = stage.jobs(above, todo, redo)
            complete |= run_shards(
                pool, stage.name, stage.worker, arguments, jobs, stage.actors, len(complete), workflow
            )
        # an actor of a driver that was killed may live on for a moment and commit after ours did
        sizes = stage.folder.sizes()
        todo = {
            name
            for name, sidecar in complete.items()
            if f"{name}.json" not in sizes or wrong_files(sidecar, sizes)
        }
    if todo:
        raise StageError(
            f"stage {stage.name}: {', '.join(sorted(todo)[:5])} vanished from {stage.folder} while the stage "
            "ran; is something else writing there?"
        )
    _remove_strangers(stage.folder, set(names))
    # of actors that were killed
    stage.folder.remove_temporaries()
    return ShardTable.of(complete[name] for name in names)


def _remove_strangers(folder: Folder, names: set[str]) -> None:
    """Removes the shards of an earlier configuration that had more of them."""
    for file in folder.names():
        stem, _, extension = file.rpartition(".")
        if extension == "json" and stem not in names and (sidecar := read_sidecar(folder, stem)):
            folder.remove(file, sidecar.file, *sidecar.files)
    if not names:
        folder.remove(SHARDS)


def exchange(stage: WholeStage, state: State, above: Upstream, say: Callable[[str], None]) -> State:
    """Sets aside what a stale stage made, under another name: it took long, and must not be continued under
    another configuration. A training that was set aside earlier and is of the present configuration and data
    comes back. Returns the stage's state after that.
    """
    folder = stage.folder.path
    if state.status == "stale":
        asked = read_asked(stage.folder) or {}
        kept = set_aside(folder, f"{STALE}{asked.get('fingerprint', 'unknown')[:8]}")
        say(f"{stage.name}: stale: {state.reason}; what it made is kept as {kept.name}")
    former = None if folder.exists() else former_training(stage, above)
    if former is None:
        return State("missing", todo=None)
    former.rename(folder)
    say(f"{stage.name}: {former.name} is of this configuration and is {stage.name} again")
    return inspect(stage, above)


def former_training(stage: WholeStage, above: Upstream) -> Path | None:
    """A set-aside training that a stage can go on with, a complete one first."""
    folder, found = stage.folder.path, {}
    for path in sorted(folder.parent.glob(f"{glob.escape(folder.name)}.{STALE}*")):
        asked = read_asked(Folder(str(path)))
        if asked is not None and is_training(asked):
            state = inspect(replace(stage, folder=Folder(str(path))), above)
            found.setdefault(state.status, path)
    return found.get("fresh") or found.get("partial")
