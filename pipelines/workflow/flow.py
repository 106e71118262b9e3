"""Data stages at work beside each other, `overlap: true`: a shard goes on to the next stage as soon as all
that it is made from is complete. What is made is the same as stage by stage.

A stage that reads a file of another as a whole (`curate` the duplicates among all samples) waits for that one
to end, unless that file depends on no shard.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Self

from pipelines.dag import ShardStage
from pipelines.runtime.metrics import StageMetrics, to_ray
from pipelines.runtime.pool import ActorPool, ShardJob, ShardRun, carry_on
from pipelines.runtime.progress import StageProgress
from pipelines.runtime.session import PATIENCE_SEC
from pipelines.runtime.sharing import share_out
from pipelines.shards.manifest import ShardTable, StageOutput, Upstream, read_output
from pipelines.shards.store import ShardError, Sidecar
from pipelines.workflow.inspection import State, problem_of, read_sidecars, wrong_files
from repfusion.files import canonical_json, file_sha256


class _Part:
    """A stage in the flow."""

    def __init__(self, stage: ShardStage, redo: Mapping[str, dict[str, Any]]):
        self.stage, self.redo = stage, redo
        self.offered: set[str] = set()
        """Shards whose inputs are complete."""
        self.complete: dict[str, str] = {}
        """Sidecars as JSON, by shard: 100,000 of them in each stage, a third of the size of the objects."""
        self.run: ShardRun | None = None
        """None where every shard so far was there already."""
        self.is_over = False
        self.held = ExitStack()

    @cached_property
    def output(self) -> StageOutput | None:
        """What the folder held before, where that is of the present configuration."""
        found = read_output(self.stage.folder)
        return found if found is not None and found.manifest.fingerprint == self.stage.fingerprint else None

    @cached_property
    def sizes(self) -> dict[str, int]:
        return self.stage.folder.sizes()

    @cached_property
    def known(self) -> dict[str, Sidecar]:
        """The sidecars that are on disk."""
        if self.output is not None:
            try:
                return {sidecar.name: sidecar for sidecar in self.output.shards}
            except ShardError:
                pass  # the sidecars say what there is
        names = [name.removesuffix(".json") for name in self.sizes if name.endswith(".json")]
        return read_sidecars(self.stage.folder, names)


class Flow:
    """Stages of shards, each after those that it reads, on their way for the length of a block. `advance`
    is called for each in turn, and `ended` when its manifest is written.

    Args:
        stages: the stages.
        above: those before them, complete.
        pool: whose actors make the shards.
        redo: shards to make again, by stage.
        workflow: the name that Prometheus is told.
        begin: prepares the folder of a stage of which something is to be made.
    """

    def __init__(
        self,
        stages: Sequence[ShardStage],
        above: Upstream,
        pool: ActorPool,
        redo: Mapping[str, Mapping[str, dict[str, Any]]],
        workflow: str,
        begin: Callable[[ShardStage, Upstream], None],
    ):
        self.pool, self.workflow, self.begin, self.above = pool, workflow, begin, above
        self.names = stages[0].shard_names(above)
        self.parts = {stage.name: _Part(stage, dict(redo.get(stage.name, {}))) for stage in stages}
        self.started = time.perf_counter()
        self._digests: dict[str, dict[str, str]] = {stage.name: {} for stage in stages}
        """sha256 of the complete shards, by stage and shard."""
        self._files: dict[tuple[str, str], str] = {}
        """sha256 of the files of complete stages."""
        self._first_jobs = {stage.name: {job.name: job for job in stage.first_jobs} for stage in stages}
        self._resources: dict[str, float] = {}
        self._looked = -PATIENCE_SEC
        for output in above.values():
            self._enter(output)

    def __enter__(self) -> Self:
        for part in self.parts.values():
            if (file := part.stage.early_file) is not None:
                self._files[part.stage.name, file] = self._early(part, file)
        for part in self.parts.values():
            self._offer_all(part)
        for part in self.parts.values():
            if part.stage.actors.num_gpus and self._flows(part.stage) and self._has_missing(part):
                self._begin(part)  # its models are loaded while the first shards are on their way
        return self

    def __exit__(self, *exception: object) -> None:
        for part in self.parts.values():
            part.held.close()

    def advance(self, stage: ShardStage) -> State | None:
        """Carries on until every shard of the stage is complete. Returns them, and those that are gone from
        disk again; None where nothing of the stage was made.

        Raises:
            StageError: after all shards of all stages that can be made, where some of this one failed.
        """
        part, total = self.parts[stage.name], len(self.names)
        with StageProgress(stage.name, total, len(part.complete)) as progress:
            while len(part.complete) < total and (runs := self._busy()):
                share_out(runs, self._cluster())
                for run, name in carry_on(runs):
                    sidecar = run.finished.pop(name)
                    self._completed(self.parts[run.stage], name, sidecar)
                    if run is part.run:
                        progress.completed(sidecar)
        if part.run is None:
            return None
        part.held.close()
        part.is_over = True
        part.run.check_failures(total)
        kept = tuple(Sidecar.model_validate_json(part.complete.pop(name)) for name in self.names)
        # an actor of a driver that was killed may live on for a moment and commit after ours did
        sizes = stage.folder.sizes()
        gone = {one.name for one in kept if f"{one.name}.json" not in sizes or wrong_files(one, sizes)}
        return State("partial", kept=kept, todo=frozenset(gone))

    def ended(self, output: StageOutput) -> None:
        """A stage is complete: what waits for its files may go on."""
        self._enter(output)
        for part in self.parts.values():
            if any(name == output.manifest.stage for name, _ in part.stage.stage_files):
                self._offer_all(part)

    def _enter(self, output: StageOutput) -> None:
        name = output.manifest.stage
        for file, side in output.manifest.files.items():
            self._files[name, file] = side.sha256
        if name not in self._digests and any(
            name == above.name for part in self.parts.values() for above in part.stage.upstream
        ):
            shards = output.shards
            self._digests[name] = dict(zip(shards.names, shards.column("sha256"), strict=True))

    def _early(self, part: _Part, file: str) -> str:
        """sha256 of a file that depends on no shard, made where the stage is not complete already."""
        side = None if part.output is None else part.output.manifest.files.get(file)
        if side is not None and part.sizes.get(file) == side.bytes:
            return side.sha256
        self._begin(part)
        part.stage.finish(part.stage.folder, ShardTable.of([]))
        with part.stage.folder.local_copy(file) as path:
            return file_sha256(path)

    def _offer_all(self, part: _Part) -> None:
        for name in self.names:
            self._offer(part, name)

    def _offer(self, part: _Part, name: str) -> None:
        """Takes up a shard whose inputs are all complete: it is there, or it is made."""
        stage = part.stage
        if name in part.offered or not self._is_ready(stage, name):
            return
        part.offered.add(name)
        job = self._job(part, name)
        sidecar = part.known.pop(name, None)
        problem = problem_of(sidecar, name, stage.fingerprint, canonical_json(job.inputs), part.sizes)
        if sidecar is not None and problem is None and name not in part.redo:
            self._completed(part, name, sidecar)
            return
        self._begin(part).waiting.append(job)

    def _is_ready(self, stage: ShardStage, name: str) -> bool:
        are_made = all(name in self._digests[one.name] for one in stage.upstream)
        return are_made and all(file in self._files for file in stage.stage_files)

    def _flows(self, stage: ShardStage) -> bool:
        """Whether shards come to the stage before those above it are through."""
        above = [self.parts[one.name].stage for one in stage.upstream if one.name in self.parts]
        return all(file in self._files for file in stage.stage_files) and all(map(self._flows, above))

    def _has_missing(self, part: _Part) -> bool:
        return not part.offered.union(part.known).issuperset(self.names)

    def _job(self, part: _Part, name: str) -> ShardJob:
        stage, more = part.stage, part.redo.get(name, {})
        if stage.first_jobs:
            first = self._first_jobs[stage.name][name]
            return ShardJob(name, stage.fingerprint, first.inputs, {**first.arguments, **more})
        inputs = {one.name: self._digests[one.name][name] for one in stage.upstream}
        inputs |= {f"{above}/{file}": self._files[above, file] for above, file in stage.stage_files}
        return ShardJob(name, stage.fingerprint, inputs, more)

    def _begin(self, part: _Part) -> ShardRun:
        if part.run is None:
            stage = part.stage
            _ = part.output, part.sizes, part.known  # before its manifest goes
            self.begin(stage, self.above)
            metrics = part.held.enter_context(StageMetrics(to_ray(), self.workflow, stage.name))
            arguments = {
                "folder": stage.folder,
                **stage.arguments,
                **part.held.enter_context(stage.surround()),
            }
            part.run = ShardRun(self.pool, stage.name, stage.worker, arguments, stage.actors, metrics)
            part.held.callback(part.run.end)
        return part.run

    def _completed(self, part: _Part, name: str, sidecar: Sidecar) -> None:
        """Hands a complete shard on to the stages that read it."""
        part.complete[name] = sidecar.model_dump_json()
        self._digests[part.stage.name][name] = sidecar.sha256
        for other in self.parts.values():
            if any(above.name == part.stage.name for above in other.stage.upstream):
                self._offer(other, name)

    def _busy(self) -> list[ShardRun]:
        """The stages at work, in their order; none where no shard is left that can be made."""
        runs = [part.run for part in self.parts.values() if part.run is not None and not part.is_over]
        return runs if any(run.is_busy for run in runs) else []

    def _cluster(self) -> Mapping[str, float]:
        """What the cluster has, looked at now and then: nodes come and go."""
        import ray

        if time.monotonic() - self._looked >= PATIENCE_SEC:
            self._resources, self._looked = ray.cluster_resources(), time.monotonic()
        return self._resources
