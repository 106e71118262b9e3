"""A raw shard -> one row for each sample: why it is dropped, if so, and what its picture is recognised by."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.dag import Place, ShardStage, Stage
from pipelines.duplicates.find import DIGEST_BYTES, DUPLICATES, find_duplicates
from pipelines.limits import Limits
from pipelines.runtime.careful import KILLED, KilledError, guarded
from pipelines.runtime.pool import ShardJob
from pipelines.runtime.session import in_worker
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples
from pipelines.stages.curate import CurateConfig, judge_fields
from repfusion.data.source_images import CLIP_EXTENSION, PICTURE_EXTENSIONS, source_members
from repfusion.images.decode import read_image
from repfusion.images.limits import BadImage
from repfusion.llm.tokenizer import CaptionLimit

if TYPE_CHECKING:
    from PIL.Image import Image

HASH_SIDE = 8
THUMBNAIL_PX = 32
COSINES = np.rint(
    4096
    * np.cos(np.pi / (2 * THUMBNAIL_PX) * np.outer(np.arange(HASH_SIDE), 2 * np.arange(THUMBNAIL_PX) + 1))
)
"""The lowest frequencies of the DCT-II as whole numbers: sums of their products with bytes stay below 2^53,
so that float64 holds them exactly and every machine finds the same bits.
"""


@dataclass
class Verdict:
    """A row of `NAME.parquet`, without the key."""

    reason: str | None = None
    """None for a sample that stays, as far as it alone decides."""
    detail: str = ""
    digest: bytes | None = None
    """The first 16 bytes of the image member's sha256, for an editing sample of one that counts its
    instruction and sources too (`_apart`); None without an image.
    """
    hash: int | None = None
    """`perceptual_hash`, for an editing sample mixed with its instruction and sources; None where the image
    cannot be decoded, and unless near duplicates are asked for: it takes longer than to decode.
    """
    width: int | None = None
    """Pixels, before ingest resized it where that is known; None where neither is."""
    height: int | None = None


def perceptual_hash(image: "Image") -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of an RGB image, in grey and at 32 x 32, lie above their
    median.

    The bits, first to last, are those of `phash` in the imagehash library, rounding apart. An image of one
    colour has the hash 2^63, whichever the colour, and black 0.
    """
    from PIL.Image import Resampling

    grey = image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Resampling.LANCZOS)
    low = (COSINES @ np.asarray(grey, np.float64) @ COSINES.T).ravel()
    middle = low.size // 2
    below, above = np.partition(low, (middle - 1, middle))[middle - 1 : middle + 1]
    return int.from_bytes(np.packbits(2 * low > below + above).tobytes(), "big")


def judge(members: dict[str, bytes], config: CurateConfig, limits: Collection[CaptionLimit] = ()) -> Verdict:
    """Looks at one sample alone."""
    verdict = Verdict()
    extension = next((extension for extension in PICTURE_EXTENSIONS if extension in members), None)
    if extension is not None:
        verdict.digest = _sha256(members[extension])[:DIGEST_BYTES]
    if extension is None or "txt" not in members:
        verdict.reason = "no_image" if extension is None else "no_caption"
        verdict.detail = f"members: {', '.join(sorted(members))}"
        return verdict
    try:
        image, (verdict.width, verdict.height) = _look(extension, members[extension], config)
    except BadImage as error:
        verdict.reason, verdict.detail = error.reason, error.detail
        return verdict
    if config.duplicates == "near":
        verdict.hash = perceptual_hash(image)
    failed = _judge_sources(members, verdict, config) or _judge_text(members, verdict, config, limits)
    verdict.reason, verdict.detail = failed or (None, "")
    return verdict


def _look(extension: str, data: bytes, config: CurateConfig) -> tuple["Image", tuple[int, int]]:
    """What a picture is recognised by, and its width and height: an image, or some frames of a clip. Raises
    BadImage, of a clip BadClip, also where it shows too little.
    """
    if extension.rpartition(".")[2] != CLIP_EXTENSION:
        image = read_image(data, config.max_pixels)
        return image, image.size
    from PIL import Image

    from repfusion.video.fitting import read_clip
    from repfusion.video.looks import check_looks, known_by

    frames = read_clip(data, config.max_pixels).frames
    if extension == CLIP_EXTENSION:  # a source may be still, to be set in motion
        check_looks(frames, config.clips)
    return Image.fromarray(known_by(frames)), (frames.shape[2], frames.shape[1])


def _judge_sources(
    members: dict[str, bytes], verdict: Verdict, config: CurateConfig
) -> tuple[str, str] | None:
    """The (reason, detail) that source pictures give, or None; enters what tells an editing sample apart."""
    try:
        sources = source_members(members)
    except ValueError as error:
        return "missing_source", str(error)
    if not sources:
        return None
    for extension in sources:
        try:
            _look(extension, members[extension], config)
        except BadImage as error:
            return "broken_source", f"{extension}: {error}"
    assert verdict.digest is not None
    apart = _apart(members, sources)
    verdict.digest = _sha256(verdict.digest + apart)[:DIGEST_BYTES]
    if verdict.hash is not None:
        # bits that differ between two targets still do, where instruction and sources are the same; about
        # half of all others do where they are not
        verdict.hash ^= int.from_bytes(apart[:8], "big")
    return None


def _apart(members: dict[str, bytes], sources: Sequence[str]) -> bytes:
    """What tells two editing samples of one target apart: the same target by another instruction, or from
    other sources, is no duplicate.
    """
    return _sha256(b"".join(_sha256(members[extension]) for extension in ("txt", *sources)))


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _judge_text(
    members: dict[str, bytes], verdict: Verdict, config: CurateConfig, limits: Collection[CaptionLimit]
) -> tuple[str, str] | None:
    """The (reason, detail) that caption and metadata give, or None; enters the original size."""
    try:
        caption = members["txt"].decode().strip()
    except UnicodeDecodeError as error:
        return "undecodable_caption", str(error)
    try:
        metadata = json.loads(members.get("json", b"{}"))
    except ValueError as error:
        return "undecodable_metadata", str(error)
    if not isinstance(metadata, dict):
        return "undecodable_metadata", f"a JSON {type(metadata).__name__}, an object is expected"
    original = [metadata.get(name) for name in ("original_width", "original_height")]
    if all(isinstance(side, int) and side > 0 for side in original):
        verdict.width, verdict.height = original
    assert verdict.width is not None and verdict.height is not None
    shorter, longer = sorted((verdict.width, verdict.height))
    if shorter < config.min_side_px:
        return "image_too_small", f"shortest side {shorter} px, at least {config.min_side_px}"
    if config.max_aspect is not None and longer > config.max_aspect * shorter:
        return "bad_aspect", f"{verdict.width} x {verdict.height}, at most {config.max_aspect:g} to 1"
    if not caption:
        return "empty_caption", ""
    if len(caption) < config.min_caption_chars:
        return "caption_too_short", f"{len(caption)} characters, at least {config.min_caption_chars}"
    if len(caption) > config.max_caption_chars:
        return "caption_too_long", f"{len(caption)} characters, at most {config.max_caption_chars}"
    return _too_many_tokens([caption, *_variants(metadata)], limits)


def _variants(metadata: dict[str, Any]) -> list[str]:
    """Texts that say what the caption says, which a training draws in its place."""
    variants = metadata.get("captions")
    return [one for one in variants if isinstance(one, str)] if isinstance(variants, list) else []


def _too_many_tokens(texts: Sequence[str], limits: Collection[CaptionLimit]) -> tuple[str, str] | None:
    found = (limit.excess(text) for limit in limits for text in texts)
    excess = next((one for one in found if one is not None), None)
    return None if excess is None else ("caption_too_many_tokens", f"{excess} (curate.max_caption_tokens)")


def prepared_judge(
    config: CurateConfig, limits: Collection[CaptionLimit]
) -> Callable[[dict[str, bytes]], Verdict]:
    """`judge` with its tokenizers loaded: the first sample is not to pay for them."""
    for limit in limits:
        _ = limit.tokenizer
    return partial(judge, config=config, limits=limits)


class JudgeWorker:
    """Reads `NAME.tar` of `source`, decodes every image or clip, and writes `NAME.parquet`: key, and the
    fields of `Verdict`.
    """

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        config: CurateConfig,
        limits: Collection[CaptionLimit] = (),
        are_clips: bool = False,
    ):
        self.folder, self.source, self.config, self.limits = folder, source, config, limits
        self._packages = ("pillow", "pyarrow", *(["av"] if are_clips else []))

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds: dict[str, Any] = {
            "key": pa.string(),
            "reason": pa.string(),
            "detail": pa.string(),
            "digest": pa.binary(DIGEST_BYTES),
            "hash": pa.uint64(),
            "width": pa.int32(),
            "height": pa.int32(),
        }
        rows: list[dict[str, Any]] = []
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, self._packages) as commit:
            sidecar = read_sidecar(self.source, job.name)
            own = partial(judge, config=self.config, limits=self.limits)
            alone = partial(prepared_judge, self.config, self.limits)
            with guarded(own, alone, job.careful_sec) as decide:
                for key, members in read_samples(self.source, f"{job.name}.tar", sidecar):
                    try:
                        verdict = decide(members)
                    except KilledError as error:
                        verdict = Verdict(KILLED, str(error))
                    rows.append({"key": key, **vars(verdict)})
            commit.samples = len(rows)
            table = pa.Table.from_pylist(rows, pa.schema(list(kinds.items())))
            pq.write_table(table, commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")


def judge_stage(
    config: CurateConfig, limits: Limits, raw: Stage, place: Place, are_clips: bool = False
) -> ShardStage:
    """The stage `judge` of images or clips that `ingest` (`raw`) holds; `limits` are those of captions."""

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        # in a task: its memory grows with the number of samples, the driver's must not
        return in_worker(find_duplicates, folder, shards, config.duplicates, config.near_duplicate_bits)

    return ShardStage(
        "judge",
        judge_fields(config, limits, are_clips),
        place.data / "judge",
        (raw,),
        JudgeWorker,
        {"source": raw.folder, "config": config, "limits": tuple(limits.values()), "are_clips": are_clips},
        config.actors,
        finish=finish,
        early_file=DUPLICATES if config.duplicates == "keep" else None,
    )
