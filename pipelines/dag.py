"""What a stage is: a pure function of its configuration and of the stages above, with a fingerprint."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import Digests
from pipelines.shards.manifest import ShardTable, Upstream
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA
from repfusion.display.interpolations import Written, restored
from repfusion.display.redaction import redact
from repfusion.files import canonical_json, digest_of
from repfusion.weights import CACHE, cached

StageT = TypeVar("StageT", bound="Stage")


@dataclass(frozen=True)
class Place:
    """Where a workflow's stages lie, and the digests of the weights and lists that they read."""

    data: Folder
    """Holds the folders of the data stages."""
    root: Path
    """Holds those of the others."""
    digests: Digests

    @property
    def columns(self) -> Path:
        """Holds the columns that training reads."""
        return local_columns(self.data, self.root)


def local_columns(data: Folder, root: Path) -> Path:
    """Where training finds the columns: beside each other on local disk, or copied there from a URL, into the
    node's own cache where REPFUSION_CACHE names one.
    """
    if data.is_local:
        return data.path
    return cached(f"{data.url}/columns").parent if os.environ.get(CACHE) else root / "columns"


@dataclass(frozen=True)
class Stage:
    """`fields` are the configuration that decides the bytes, under flat dotted names; `folder` is where they
    go.
    """

    name: str
    fields: dict[str, Any]
    folder: Folder
    upstream: tuple["Stage", ...] = ()
    check: Callable[[], object] = field(default=lambda: None, kw_only=True)
    """Looks at what the stage needs of models before the first stage of a run. Raises ValueError where it
    would fail.
    """
    written: Written = field(default_factory=dict, kw_only=True)
    """Texts of the fields that follow from the environment."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides this stage's output."""
        above = {stage.name: stage.fingerprint for stage in self.upstream}
        return digest_of({"schema": SCHEMA, "stage": self.name, "fields": self.fields, "upstream": above})

    @cached_property
    def shown(self) -> dict[str, Any]:
        """The fields as they are written and compared: values from the environment as the file has
        them, no secret.
        """
        return redact(restored(self.fields, self.written))

    @cached_property
    def lineage(self) -> dict[str, dict[str, Any]]:
        """The fields of every stage above, by stage, as they are written."""
        fields: dict[str, dict[str, Any]] = {}
        for stage in self.upstream:
            fields |= stage.lineage | {stage.name: stage.shown}
        return fields


def with_texts(stages: Iterable[StageT], written: Written) -> list[StageT]:
    """Stages, each after those that it reads, that know the texts of their fields from the environment."""
    made: dict[str, StageT] = {}
    for stage in stages:
        upstream = tuple(made[one.name] for one in stage.upstream)
        made[stage.name] = replace(stage, upstream=upstream, written=written)
    return list(made.values())


@dataclass(frozen=True)
class ShardStage(Stage):
    """A stage of independent shards, named as those of its first upstream stage unless `first_jobs` lists
    them. A stage upstream that is not made of shards, such as a tokenizer's, is read as a whole by each.
    """

    worker: type = object
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the worker's constructor, beside `folder`."""
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    first_jobs: tuple[ShardJob, ...] = ()
    """The jobs of a stage without upstream, with the identity of what they read as `inputs`."""
    reaches_out: bool = False
    """Whether it asks servers of others for its input: then nothing is asked twice without need."""
    stage_files: tuple[tuple[str, str], ...] = ()
    """Files of upstream stages as a whole that every shard depends on: (stage, file)."""
    surround: Callable[[], AbstractContextManager[dict[str, Any]]] = lambda: nullcontext({})
    """Held while the shards run; yields further arguments of the worker (the address of a server)."""
    finish: Callable[[Folder, ShardTable], list[str]] = lambda folder, shards: []
    """Makes the files of the stage as a whole; returns their names in the stage's folder."""
    early_file: str | None = None
    """The one of those that depends on no shard, where there is one: `finish` makes it of none."""

    @property
    def made_by(self) -> tuple[str, ...]:
        """Names of the stages upstream that are not made of shards."""
        return tuple(stage.name for stage in self.upstream if isinstance(stage, WholeStage))

    def shard_names(self, above: Upstream) -> list[str]:
        """Names of the shards, in order. `above` has to hold the upstream stages."""
        if not self.upstream:
            return [job.name for job in self.first_jobs]
        return above[self.upstream[0].name].shards.names

    def shard_inputs(self, above: Upstream) -> list[str]:
        """What each shard is made from, as canonical JSON: sha256 of the upstream shards and stage files, and
        of the manifests of stages that are no shards.
        """
        if not self.upstream:
            return [canonical_json(job.inputs) if job.inputs else "{}" for job in self.first_jobs]
        columns: dict[str, list[str]] = {}
        names = self.shard_names(above)
        for stage in self.upstream:
            if isinstance(stage, WholeStage):
                columns[stage.name] = [above[stage.name].manifest.digest] * len(names)
                continue
            shards = above[stage.name].shards
            assert shards.names == names, f"{stage.name} has other shards than {self.upstream[0].name}"
            columns[stage.name] = shards.column("sha256")
        for stage_name, file in self.stage_files:
            digest = above[stage_name].manifest.files[file].sha256
            columns[f"{stage_name}/{file}"] = [digest] * len(names)
        # the JSON of a dict a shard, but without making the dicts: there may be 100,000 shards
        pattern = ",".join(f'"{name}":"%s"' for name in sorted(columns))
        rows = zip(*(columns[name] for name in sorted(columns)), strict=True)
        return ["{" + pattern % row + "}" for row in rows]

    def jobs(
        self, above: Upstream, wanted: set[str], extra: Mapping[str, dict[str, Any]]
    ) -> Iterator[ShardJob]:
        """The jobs of some shards, in order; `extra` arguments by shard."""
        import json

        first = {job.name: job for job in self.first_jobs}
        for name, inputs in zip(self.shard_names(above), self.shard_inputs(above), strict=True):
            if name in wanted:
                arguments = first[name].arguments if first else {}
                more = extra.get(name, {})
                yield ShardJob(name, self.fingerprint, json.loads(inputs), {**arguments, **more})


@dataclass(frozen=True)
class WholeStage(Stage):
    """A stage that does its own work in its own local folder, and resumes there: training, evaluation, the
    report.
    """

    execute: Callable[[Upstream], dict[str, Any]] = lambda above: {}
    """Given the stages before it, returns what its manifest keeps under `extra`."""
    outputs: tuple[Path, ...] = ()
    """Files that have to exist for the stage to be fresh."""
    needs_ray: bool = True
