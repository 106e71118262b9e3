"""Raw shards -> the shards that training uses; every sample that is left out has a counted reason and a
line in a list.
"""

import io
import json
import warnings
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.pool import ActorsConfig, ShardJob
from pipelines.store import ShardCommit, Sidecar, read_samples, read_sidecar, tar_shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class CurateConfig(BaseModel):
    """Which samples stay."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    min_side_px: int = Field(default=16, ge=1)
    """Shortest side an image may have, before ingest resized it where that is known."""
    min_caption_chars: int = Field(default=1, ge=0)
    """Shortest caption, surrounding space not counted."""
    max_caption_chars: int = Field(default=1000, ge=1)
    """Longest caption. Choose it so that captions fit into the MLLM's context."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """A shard that loses more than this fails instead. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """Its pool. Changes no bytes."""


def fingerprint_fields(config: CurateConfig) -> dict[str, Any]:
    """What decides the bytes."""
    fields = config.model_dump(mode="json", include={"min_side_px", "min_caption_chars", "max_caption_chars"})
    return {f"curate.{name}": value for name, value in fields.items()}


def judge(members: dict[str, bytes], config: CurateConfig) -> tuple[str, str] | None:
    """The (reason, detail) for which a sample is dropped, or None. The one place where an exception means
    a bad sample.
    """
    from PIL import Image

    extension = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
    if extension is None:
        return "no_image", f"members: {', '.join(sorted(members))}"
    if "txt" not in members:
        return "no_caption", f"members: {', '.join(sorted(members))}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(members[extension])) as image:
                image.load()
                side = min(image.size)
    except Exception as error:  # noqa: BLE001  decoders raise anything on hostile bytes
        return "undecodable_image", f"{type(error).__name__}: {error}"
    try:
        caption = members["txt"].decode().strip()
    except UnicodeDecodeError as error:
        return "undecodable_caption", str(error)
    try:
        metadata = json.loads(members.get("json", b"{}"))
    except ValueError as error:
        return "undecodable_metadata", str(error)
    sides = [metadata[name] for name in ("original_width", "original_height") if metadata.get(name)]
    side = min(sides, default=side)
    if side < config.min_side_px:
        return "image_too_small", f"shortest side {side} px, at least {config.min_side_px}"
    if not caption:
        return "empty_caption", ""
    if len(caption) < config.min_caption_chars:
        return "caption_too_short", f"{len(caption)} characters, at least {config.min_caption_chars}"
    if len(caption) > config.max_caption_chars:
        return "caption_too_long", f"{len(caption)} characters, at most {config.max_caption_chars}"
    return None


class CurateWorker:
    """Copies what is good of `NAME.tar`, byte for byte, and lists the rest in `NAME.drops.parquet`."""

    def __init__(self, folder: Path, source: Path, config: CurateConfig):
        self.folder, self.source, self.config = folder, source, config

    def __call__(self, job: ShardJob) -> Sidecar:
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("pillow", "webdataset")
        ) as commit:
            with tar_shard(commit) as samples:
                for key, members in read_samples(
                    self.source / f"{job.name}.tar", read_sidecar(self.source, job.name)
                ):
                    if (bad := judge(members, self.config)) is None:
                        samples.write(key, members)
                    else:
                        commit.drop(key, *bad)
            commit.check_drops(self.config.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")
