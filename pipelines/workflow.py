"""Stages and their fingerprints: what is fresh, what is stale and why, and running the rest in order.

A stage is a pure function of its configuration and the stages above. Its state is plain files: `stage.json`
(what was asked for,
written at the start), shards with sidecars, and `manifest.json` (written when all is complete).
"""

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipelines import store
from pipelines.pool import ActorPool, ActorsConfig, RayConfig, ShardJob, ray_session, run_shards
from pipelines.store import Manifest, Sidecar

Status = Literal["fresh", "partial", "stale", "missing"]


@dataclass(frozen=True)
class Stage:
    """`fields` are the configuration that decides the bytes, under flat dotted names."""

    name: str
    fields: dict[str, Any]
    upstream: tuple["Stage", ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides this stage's output."""
        above = {stage.name: stage.fingerprint for stage in self.upstream}
        return store.digest_of(
            {"schema": store.SCHEMA, "stage": self.name, "fields": self.fields, "upstream": above}
        )

    @cached_property
    def lineage(self) -> dict[str, dict[str, Any]]:
        """The fields of every stage above, by stage."""
        fields: dict[str, dict[str, Any]] = {}
        for stage in self.upstream:
            fields |= stage.lineage | {stage.name: stage.fields}
        return fields


@dataclass(frozen=True)
class ShardStage(Stage):
    """A stage of independent shards, one for each shard of its first upstream stage unless `first_jobs`
    lists them.
    """

    worker: type = object
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the worker's constructor."""
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    first_jobs: tuple[ShardJob, ...] = ()
    """The jobs of a stage without upstream; their fingerprints are filled in."""
    surround: Callable[[], AbstractContextManager[dict[str, Any]]] = lambda: nullcontext({})
    """Held while the shards run; yields further arguments of the worker (the address of a server)."""
    finish: Callable[[Path, Sequence[Sidecar]], list[str]] = lambda folder, sidecars: []
    """Makes the files of the stage as a whole; returns their names in the stage's folder."""


@dataclass(frozen=True)
class WholeStage(Stage):
    """A stage that does its own work in its own folder, and resumes there: training, evaluation, the
    report.
    """

    execute: Callable[[Mapping[str, Manifest]], dict[str, Any]] = lambda manifests: {}
    """Given the manifests of the stages before it, returns what its own keeps under `extra`."""
    outputs: tuple[Path, ...] = ()
    """Files that have to exist for the stage to be fresh."""
    needs_ray: bool = True


@dataclass(frozen=True)
class State:
    """What is on disk for a stage, and what is left to do."""

    status: Status
    reason: str = ""
    manifest: Manifest | None = None
    complete: dict[str, Sidecar] = field(default_factory=dict)
    jobs: tuple[ShardJob, ...] = ()
    """All shards of the stage, complete or not."""


@dataclass(frozen=True)
class StageResult:
    """One line of the summary."""

    name: str
    skipped: bool
    manifest: Manifest


def shard_jobs(stage: ShardStage, upstream: Mapping[str, Manifest]) -> tuple[ShardJob, ...]:
    """The stage's shards. Their names are those of the first upstream stage's."""
    if not stage.upstream:
        return tuple(ShardJob(job.name, stage.fingerprint, {}, job.arguments) for job in stage.first_jobs)
    source = stage.upstream[0].name
    return tuple(
        ShardJob(shard.name, stage.fingerprint, {source: shard.sha256}) for shard in upstream[source].shards
    )


def inspect(stage: Stage, root: Path, upstream: Mapping[str, Manifest]) -> State:
    """Compares what is on disk with what the configuration asks for. `upstream` holds the manifests of
    fresh stages above.
    """
    folder = root / stage.name
    manifest = store.read_manifest(folder)
    asked = _asked_for(folder)
    if asked is None:
        return State("missing", "not run yet", jobs=_jobs(stage, upstream))
    if asked["fingerprint"] != stage.fingerprint:
        return State("stale", explain(asked, stage), jobs=_jobs(stage, upstream))
    above = [one.name for one in stage.upstream if one.name not in upstream]
    if above:
        return State(
            "stale",
            f"{' and '.join(above)} above {'is' if len(above) == 1 else 'are'} not complete",
            manifest,
        )
    if isinstance(stage, ShardStage):
        return _inspect_shards(stage, folder, manifest, shard_jobs(stage, upstream))
    assert isinstance(stage, WholeStage)
    if manifest is None:
        return State("partial", "started, not complete")
    for name, digest in manifest.extra.get("upstream_digests", {}).items():
        if upstream[name].digest != digest:
            return State("stale", f"the data of {name} changed")
    gone = [path.name for path in stage.outputs if not path.is_file()]
    return (
        State("partial", f"{', '.join(gone)} missing", manifest)
        if gone
        else State("fresh", manifest=manifest)
    )


def _jobs(stage: Stage, upstream: Mapping[str, Manifest]) -> tuple[ShardJob, ...]:
    ready = isinstance(stage, ShardStage) and all(one.name in upstream for one in stage.upstream)
    return shard_jobs(stage, upstream) if ready else ()


def _inspect_shards(
    stage: ShardStage, folder: Path, manifest: Manifest | None, jobs: tuple[ShardJob, ...]
) -> State:
    listed = {shard.name: shard for shard in manifest.shards} if manifest else {}
    complete: dict[str, Sidecar] = {}
    problems: list[str] = []
    for job in jobs:
        # whoever deletes a sidecar asks for its shard to be made again, whatever the manifest says
        has_sidecar = (folder / f"{job.name}.json").is_file()
        sidecar = listed.get(job.name) or store.read_sidecar(folder, job.name)
        if not has_sidecar or sidecar is None or sidecar.fingerprint != stage.fingerprint:
            problems.append(f"{job.name} missing")
        elif sidecar.inputs != job.inputs:
            problems.append(f"{job.name} made from other data")
        elif wrong := store.missing_files(folder, sidecar):
            problems.append(f"{wrong[0]} missing or of another size")
        else:
            complete[job.name] = sidecar
    if problems:
        return State(
            "partial", f"{len(problems)} of {len(jobs)} shards to do: {problems[0]}", manifest, complete, jobs
        )
    if manifest is None or listed.keys() != complete.keys():
        return State("partial", "all shards complete, the manifest is not written", None, complete, jobs)
    gone = [name for name in manifest.files if not (folder / name).is_file()]
    if gone:
        return State("partial", f"{', '.join(gone)} missing", manifest, complete, jobs)
    return State("fresh", "", manifest, complete, jobs)


def _asked_for(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "stage.json").read_bytes())
    except (OSError, ValueError):
        return None


def explain(asked: Mapping[str, Any], stage: Stage) -> str:
    """Which fields, of this stage or one above, changed from what to what."""
    if asked.get("schema") != store.SCHEMA:
        return f"written by schema {asked.get('schema')}, this is {store.SCHEMA}"
    changes: list[str] = []
    old_all = {**asked["lineage"], stage.name: asked["fields"]}
    new_all = {**stage.lineage, stage.name: stage.fields}
    for name in dict.fromkeys([*new_all, *old_all]):
        old, new = old_all.get(name, {}), new_all.get(name, {})
        changes += [
            f"{key} {_show(old.get(key))} -> {_show(new.get(key))}"
            for key in dict.fromkeys([*new, *old])
            if old.get(key) != new.get(key)
        ]
    return ", ".join(changes) or "the stages above are other ones"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else store.canonical_json(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def describe(manifest: Manifest) -> str:
    """`8 shards, 3,960 samples`, with the drops where there are any."""
    if not manifest.shards:
        return "done"
    text = (
        f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}, {manifest.samples:,} samples"
    )
    drops = ", ".join(f"{reason} {count}" for reason, count in manifest.drops.items())
    return f"{text}, dropped: {drops}" if drops else text


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second run out of the same root; the lock goes with the process, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{root}: another run is at work here; wait for it, or give root=another/folder"
            ) from error
        yield


def states(stages: Sequence[Stage], root: Path) -> dict[str, State]:
    """The state of every stage, reading only."""
    found: dict[str, State] = {}
    for stage in stages:
        fresh = {
            name: state.manifest
            for name, state in found.items()
            if state.status == "fresh" and state.manifest
        }
        found[stage.name] = inspect(stage, root, fresh)
    return found


def run(
    stages: Sequence[Stage],
    root: Path,
    ray: RayConfig,
    say: Callable[[str], None] = print,
    pool: ActorPool | None = None,
) -> list[StageResult]:
    """Brings every stage up to date, in order; Ray starts only when there is something to do for
    it. A `pool` that is given is kept warm for the next run.

    Raises:
        StageError: where shards failed; the stage's other shards are complete.
        ValueError: where another run holds the root.
    """
    results: list[StageResult] = []
    manifests: dict[str, Manifest] = {}
    owns_pool = pool is None
    with locked(root), ExitStack() as session:
        pool = pool or ActorPool()
        for stage in stages:
            state = inspect(stage, root, manifests)
            if state.status == "fresh":
                assert state.manifest is not None
                manifest = state.manifest
                say(f"{stage.name}: fresh, skipped ({describe(manifest)})")
            else:
                if state.status != "missing":
                    say(f"{stage.name}: {state.status}: {state.reason}")
                if not isinstance(stage, WholeStage) or stage.needs_ray:
                    session.enter_context(ray_session(ray))
                    if owns_pool:
                        session.callback(pool.close)
                if isinstance(stage, WholeStage):
                    # its own workers need the CPUs
                    pool.close()
                manifest = _bring_up_to_date(stage, root / stage.name, state, manifests, pool)
                say(f"{stage.name}: {describe(manifest)} in {manifest.seconds:.1f} s")
            manifests[stage.name] = manifest
            results.append(StageResult(stage.name, state.status == "fresh", manifest))
    return results


def _bring_up_to_date(
    stage: Stage, folder: Path, state: State, upstream: Mapping[str, Manifest], pool: ActorPool
) -> Manifest:
    start = time.perf_counter()
    # without its manifest nobody downstream mistakes a stage at work for a complete one
    (folder / "manifest.json").unlink(missing_ok=True)
    if isinstance(stage, WholeStage) and state.status == "stale" and folder.is_dir():
        _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store.remove_temporaries(folder)
    asked = {
        "schema": store.SCHEMA,
        "fingerprint": stage.fingerprint,
        "fields": stage.fields,
        "lineage": stage.lineage,
    }
    store.write_json(folder / "stage.json", asked)
    shards: list[Sidecar] = []
    names: list[str] = []
    extra: dict[str, Any] = {}
    match stage:
        case ShardStage():
            shards = _run_shard_stage(stage, folder, state, pool)
            names = stage.finish(folder, shards)
        case WholeStage():
            extra = stage.execute(upstream)
            extra |= {"upstream_digests": {one.name: upstream[one.name].digest for one in stage.upstream}}
    drops: Counter[str] = Counter()
    for shard in shards:
        drops.update(shard.drops)
    manifest = Manifest(
        schema=store.SCHEMA,
        stage=stage.name,
        fingerprint=stage.fingerprint,
        fields=stage.fields,
        upstream={one.name: one.fingerprint for one in stage.upstream},
        lineage=stage.lineage,
        shards=shards,
        samples=sum(shard.samples for shard in shards),
        drops=dict(sorted(drops.items())),
        seconds=round(time.perf_counter() - start, 3),
        files={name: store.side_file(folder / name) for name in names},
        extra=extra,
    )
    store.write_manifest(folder, manifest)
    return manifest


def _run_shard_stage(stage: ShardStage, folder: Path, state: State, pool: ActorPool) -> list[Sidecar]:
    jobs = state.jobs
    missing = [job for job in jobs if job.name not in state.complete]
    made: dict[str, Sidecar] = {}
    if missing:
        with stage.surround() as more:
            arguments = {"folder": folder, **stage.arguments, **more}
            done = len(jobs) - len(missing)
            made = {
                sidecar.name: sidecar
                for sidecar in run_shards(
                    pool, stage.name, stage.worker, arguments, missing, stage.actors, done
                )
            }
    _remove_strangers(folder, {job.name for job in jobs})
    return [state.complete.get(job.name) or made[job.name] for job in jobs]


def _remove_strangers(folder: Path, names: set[str]) -> None:
    """Removes the shards of an earlier configuration that had more of them."""
    for path in folder.glob("[0-9]*.json"):
        if path.stem in names:
            continue
        if sidecar := store.read_sidecar(folder, path.stem):
            for name in (path.name, sidecar.file, *sidecar.files):
                (folder / name).unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    """Keeps what a stale training made, under another name: it took long, and must not be continued under
    another configuration.
    """
    asked = _asked_for(folder) or {}
    target = folder.with_name(f"{folder.name}.stale-{asked.get('fingerprint', 'unknown')[:8]}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
