"""Seeds -> editing samples of the embedded world: a source scene, an instruction, the scene that it asks
for.

They are drawn by `ingest` itself: unlike scenes, which show how lists are downloaded, they have no addresses.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from pipelines.sources.base import Entries, numbered_entries, ranged_jobs, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.raw_samples import Entry, SampleMaker, write_drawn
from pipelines.sources.scenes import NO_IMAGE, defect_positions, png_of
from repfusion.config import Config
from repfusion.scenes.captions import Wording
from repfusion.scenes.edits import EVEN, Edit, EditKind, draw_triple
from repfusion.scenes.world import WorldConfig


class EditDefectsConfig(Config):
    """Samples spoilt on purpose, so that a run shows how drops are counted. They replace healthy ones."""

    missing_source: int = Field(default=0, ge=0)
    """Samples without their source picture."""
    undecodable_source: int = Field(default=0, ge=0)
    """Source pictures that are no images."""
    missing: int = Field(default=0, ge=0)
    """Samples without their target."""
    undecodable: int = Field(default=0, ge=0)
    """Targets that are no images."""
    empty_caption: int = Field(default=0, ge=0)
    """Instructions without text."""


class EditsConfig(Config):
    """What the embedded world draws of editing."""

    kind: Literal["edits"] = "edits"
    shard_size: int = Field(default=500, ge=1)
    """Samples per shard, the unit of work, failure and resume of every later stage."""
    num_samples: int = Field(default=4000, ge=1)
    """Editing samples, defects included."""
    seed: int = Field(default=0, ge=0)
    """Sample i is the edit of seed `seed * 2**32 + i`."""
    world: WorldConfig = WorldConfig()
    """Image size, and which shapes and colours occur how often."""
    kinds: dict[EditKind, float] = dict(EVEN)
    """How often each kind of edit is drawn, relative to the others; kinds that are left out are not."""
    wording: Wording = "varied"
    """How instructions are put."""
    defects: EditDefectsConfig = EditDefectsConfig()
    """Samples spoilt on purpose."""

    @field_validator("kinds")
    @classmethod
    def _some_kind_is_drawn(cls, kinds: dict[EditKind, float]) -> dict[EditKind, float]:
        if not any(kinds.values()) or not all(math.isfinite(one) and one >= 0 for one in kinds.values()):
            raise ValueError(f"{kinds}: expected weights that are 0 or more, one of them above")
        return kinds


@dataclass(frozen=True)
class EditsSource:
    """Edits that are drawn by `ingest`."""

    config: EditsConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields = flatten(self.config.model_dump(mode="json"), "source.") | image_fields(ingest)
        return [read_stage(EditWorker, self.config, fields, jobs(self.config), ingest, place)]

    def entries(self) -> Entries:
        return numbered_entries(self.config.num_samples, self.config.shard_size)


def jobs(config: EditsConfig) -> tuple[ShardJob, ...]:
    """Shards of `source.shard_size` samples. Raises ValueError where there are more defects than samples."""
    defect_positions(config)
    return ranged_jobs(config.num_samples, config.shard_size)


class EditWorker:
    """Makes `NAME.tar` of edits: the target, the instruction, the source picture, and the json, whose `edit`
    says kind, description of the target, and both scenes.

    Reasons of drops: no_image, missing_source, broken_source, and those of ImageFitter.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: EditsConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._defects = defect_positions(config)
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        return write_drawn(job, self.folder, self.ingest, self._make, self._entry)

    def _entry(self, position: int) -> Entry:
        """Target, instruction, metadata and source picture, spoilt where they are to be."""
        config = self.config
        seed = (config.seed << 32) + position
        edit = draw_triple(seed, config.world, config.kinds, wording=config.wording)
        source, target = png_of(edit.source, config.world), png_of(edit.target, config.world)
        metadata = {"edit": _facts(edit)}
        match self._defects.get(position):
            case "missing_source":
                return target, edit.instruction, metadata, [None]
            case "undecodable_source":
                return target, edit.instruction, metadata, [NO_IMAGE]
            case "missing":
                return None, edit.instruction, metadata, [source]
            case "undecodable":
                return NO_IMAGE, edit.instruction, metadata, [source]
            case "empty_caption":
                return target, "", metadata, [source]
        return target, edit.instruction, metadata, [source]


def _facts(edit: Edit) -> dict[str, Any]:
    return {
        "kind": edit.kind,
        "described": edit.described,
        "source": edit.source.facts,
        "target": edit.target.facts,
    }
