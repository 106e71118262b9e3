"""Seeds -> clips of the embedded world with captions of their motion, or editing samples of clips.

They are drawn by `ingest` itself, which brings them to its form as it does any other clip.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from pipelines.sources.base import Entries, numbered_entries, ranged_jobs, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.raw_samples import Entry, SampleMaker, write_drawn
from pipelines.sources.scenes import CAPTION_STREAM, NO_IMAGE, defect_positions
from repfusion.config import Config
from repfusion.scenes.captions import Wording
from repfusion.scenes.moving.captions import caption_clip
from repfusion.scenes.moving.clips import MOTION_KINDS, ClipWorldConfig, MotionKind, draw_clip, render_clip
from repfusion.scenes.moving.edits import draw_clip_edit


class ClipDefectsConfig(Config):
    """Samples spoilt on purpose, so that a run shows how drops are counted. They replace healthy ones."""

    missing: int = Field(default=0, ge=0)
    """Samples without their clip."""
    undecodable: int = Field(default=0, ge=0)
    """Clips that are none."""
    too_short: int = Field(default=0, ge=0)
    """Clips of half the frames."""
    black: int = Field(default=0, ge=0)
    """Clips that show nothing, for `judge` to count."""
    still: int = Field(default=0, ge=0)
    """Clips in which nothing moves, for `judge` to count."""
    repeated: int = Field(default=0, ge=0)
    """Clips that show what the first healthy one shows, for `judge` to count all but one."""
    empty_caption: int = Field(default=0, ge=0)
    """Captions without text, for `judge` to count."""


class MovingScenesConfig(Config):
    """What the embedded world draws of motion; needs `ingest.clips`."""

    kind: Literal["moving_scenes"] = "moving_scenes"
    shard_size: int = Field(default=500, ge=1)
    """Samples per shard, the unit of work, failure and resume of every later stage."""
    num_samples: int = Field(default=2000, ge=1)
    """Clips, defects included."""
    seed: int = Field(default=0, ge=0)
    """Sample i is the clip, or the edit, of seed `seed * 2**32 + i`."""
    world: ClipWorldConfig = ClipWorldConfig()
    """Size, length and rate of the clips, and which shapes and colours occur."""
    motions: tuple[MotionKind, ...] = Field(default=MOTION_KINDS, min_length=1)
    """Motions that are drawn, each as often as the others; edits have all of them."""
    edits: bool = False
    """Whether samples are edits: a source clip (`KEY.source.mp4`), an instruction, the clip it asks for."""
    wording: Wording = "varied"
    """How captions put what they state, and instructions what they ask for."""
    defects: ClipDefectsConfig = ClipDefectsConfig()
    """Samples spoilt on purpose."""


@dataclass(frozen=True)
class MovingScenesSource:
    """Clips that are drawn by `ingest`."""

    config: MovingScenesConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields = flatten(self.config.model_dump(mode="json"), "source.") | image_fields(ingest)
        return [read_stage(MovingScenesWorker, self.config, fields, jobs(self.config), ingest, place)]

    def entries(self) -> Entries:
        return numbered_entries(self.config.num_samples, self.config.shard_size)


def jobs(config: MovingScenesConfig) -> tuple[ShardJob, ...]:
    """Shards of `source.shard_size` samples. Raises ValueError where there are more defects than samples."""
    defect_positions(config)
    return ranged_jobs(config.num_samples, config.shard_size)


class MovingScenesWorker:
    """Makes `NAME.tar` of clips: the clip, its caption and the json, whose `moving_scene` says what it shows;
    of edits the instruction, the source clip, and the json's `clip_edit`.

    Reasons of drops: no_image, missing_source, broken_source, and those of BadClip.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: MovingScenesConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._defects = defect_positions(config)
        self._first = next((i for i in range(config.num_samples) if i not in self._defects), 0)
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        return write_drawn(job, self.folder, self.ingest, self._make, self._entry)

    def _entry(self, position: int) -> Entry:
        """A sample, spoilt where it is to be."""
        defect = self._defects.get(position)
        seed = (self.config.seed << 32) + (self._first if defect == "repeated" else position)
        made = self._edit(seed, defect) if self.config.edits else self._clip(seed, defect)
        data, caption, metadata, sources = made
        match defect:
            case "missing":
                return None, caption, metadata, sources
            case "undecodable":
                return NO_IMAGE, caption, metadata, sources
            case "empty_caption":
                return data, "", metadata, sources
        return made

    def _clip(self, seed: int, defect: str | None) -> Entry:
        config = self.config
        clip = draw_clip(seed, config.world, kinds=config.motions)
        caption = caption_clip(clip, np.random.default_rng([seed, CAPTION_STREAM]), config.wording)
        data = self._encoded(render_clip(clip, config.world), defect)
        return data, caption, {"moving_scene": clip.facts}, ()

    def _edit(self, seed: int, defect: str | None) -> Entry:
        config = self.config
        edit = draw_clip_edit(seed, config.world, wording=config.wording)
        before, after = (render_clip(clip, config.world) for clip in (edit.source, edit.target))
        facts = {"kind": edit.kind, "source": edit.source.facts, "target": edit.target.facts}
        data, source = self._encoded(after, defect), self._encoded(before)
        return data, edit.instruction, {"clip_edit": facts}, (source,)

    def _encoded(self, frames: UInt8[np.ndarray, "f h w 3"], defect: str | None = None) -> bytes:
        """Frames as a lossless file, spoilt where they are to be."""
        from repfusion.video.files import encode_clip

        match defect:
            case "too_short":
                frames = frames[: len(frames) // 2]
            case "black":
                frames = np.zeros_like(frames)
            case "still":
                frames = np.repeat(frames[-1:], len(frames), axis=0)
        return encode_clip(frames, self.config.world.rate)
