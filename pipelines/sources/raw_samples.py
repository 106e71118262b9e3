"""An image or a clip, its caption and what else an input says of it -> the members of a raw sample, as
`ingest` stores them.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator

from pipelines.lists.captions import clean
from pipelines.lists.values import BadEntry, json_values
from pipelines.runtime.careful import KILLED, KilledError, guarded
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, sample_key
from pipelines.shards.tars import tar_shard
from pipelines.sources.ingest import SIZES, ImageFitter, IngestConfig
from repfusion.data.source_images import CLIP_EXTENSION, source_member
from repfusion.files import canonical_json
from repfusion.images.decode import EncodedImage
from repfusion.images.limits import BadImage
from repfusion.video.forms import ClipForm

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""What counts as an image by its name."""
CLIP_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif")
"""What counts as a clip by its name."""
OWN_FIELDS = {"key", "source_key", "source_file", *SIZES}
"""Fields of a sample's JSON that are ours to give."""
PACKAGES = ("img2dataset", "opencv-python-headless", "pillow")

Entry = tuple[bytes | None, str, dict[str, Any], Sequence[bytes | None]]
"""Image or clip, caption or instruction, metadata, and source pictures."""


def free_names(reserved: Set[str]) -> AfterValidator:
    """A check of column names that become fields of a sample's JSON: none may be a reserved one."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        if taken := reserved & set(names):
            raise ValueError(
                f"{sorted(taken)} are names that the sample's json has already; rename the columns"
            )
        return names

    return AfterValidator(check)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"{list(names)}: expected names that differ, none of them empty")
    return names


SourceImages = Annotated[tuple[str, ...], AfterValidator(_distinct)]
"""Where an input has the source pictures of a sample, in the order in which its instruction counts them."""


def source_image_fields(names: SourceImages) -> dict[str, Any]:
    """Where source pictures come from, as a part of a fingerprint; nothing where there are none."""
    return {"source.images": list(names)} if names else {}


def picture_endings(config: IngestConfig) -> tuple[str, ...]:
    """What counts by its name as that of which samples are made: images, or clips."""
    return IMAGE_ENDINGS if config.clips is None else CLIP_ENDINGS


def picture_packages(config: IngestConfig) -> tuple[str, ...]:
    """Libraries that decide the bytes of samples."""
    return PACKAGES if config.clips is None else ("av", "opencv-python-headless", "pillow")


class SampleMaker:
    """Makes samples; may be called from several threads.

    With `ingest.image_size` null, images that are plain (`EncodedImage.plain_extension`) and can be decoded
    keep their bytes. With `ingest.clips`, pictures are clips: each becomes an mp4 of that form, and the
    json's `clip` says its length and rate.
    """

    def __init__(self, config: IngestConfig):
        self.config = config
        self._fitter = ImageFitter(config)

    def __call__(
        self,
        key: str,
        image: bytes | None,
        caption: str | None,
        metadata: dict[str, Any],
        sources: Sequence[bytes | None] = (),
    ) -> dict[str, bytes]:
        """Members by extension. `metadata` goes into the JSON, beside the key and the image's sizes. Source
        pictures are fitted as the image is: a sample has all of them, or there is none.

        Raises:
            BadEntry: no_image, no_caption, undecodable_caption, undecodable_metadata, missing_source,
                broken_source, or one of ImageFitter's reasons, of clips one of BadClip's.
        """
        if image is None:
            raise BadEntry("no_image", "no image")
        if caption is None:
            raise BadEntry("no_caption", "no caption")
        try:
            extension, data, sizes = self._fit(image)
        except BadImage as error:
            raise BadEntry(error.reason, error.detail) from error
        text = canonical_json(json_values({**metadata, "key": key, **sizes}))
        members = {extension: data, "txt": clean(caption).encode(), "json": text.encode()}
        return members | dict(self._source(number, one) for number, one in enumerate(sources, start=1))

    def _source(self, number: int, data: bytes | None) -> tuple[str, bytes]:
        """Extension and bytes of a source picture's member."""
        if data is None:
            raise BadEntry("missing_source", f"no source image {number}")
        try:
            extension, fitted, _ = self._fit(data)
        except BadImage as error:
            raise BadEntry("broken_source", f"source image {number}: {error}") from error
        return source_member(number, extension), fitted

    def _fit(self, data: bytes) -> tuple[str, bytes, dict[str, Any]]:
        """Extension and bytes as they are stored, and what the JSON says of them."""
        if self.config.clips is not None:
            return _fitted_clip(data, self.config.clips, self.config)
        if self.config.image_size is None:
            image = EncodedImage(data, self.config.max_pixels)
            if image.plain_extension is not None:
                width, height = image.decode().size
                return image.plain_extension, data, dict(zip(SIZES, (width, height) * 2, strict=True))
        return self.config.encode, *self._fitter(data)


def _fitted_clip(data: bytes, form: ClipForm, config: IngestConfig) -> tuple[str, bytes, dict[str, Any]]:
    from repfusion.video.fitting import fit_clip

    found = fit_clip(data, form, config.image_size, config.max_pixels)
    sizes = (found.width, found.height, found.original_width, found.original_height)
    said = {
        "num_frames": form.num_frames,
        "rate": form.rate,
        "original_sec": round(found.original_sec, 3),
        "original_rate": round(found.original_rate, 3),
    }
    return CLIP_EXTENSION, found.data, {**dict(zip(SIZES, sizes, strict=True)), "clip": said}


@contextmanager
def sample_maker(maker: SampleMaker, careful_sec: float | None) -> Iterator[Callable[..., dict[str, bytes]]]:
    """The maker; for a shard that has to be made carefully, in a process of its own. A sample that kills it
    is a BadEntry too, `killed_its_process`.
    """
    with guarded(maker, partial(type(maker), maker.config), careful_sec) as made:

        def make(key: str, *entry: Any) -> dict[str, bytes]:
            try:
                return made(key, *entry)
            except KilledError as error:
                raise BadEntry(KILLED, str(error)) from error

        yield make


def write_drawn(
    job: ShardJob, folder: Folder, config: IngestConfig, make: SampleMaker, draw: Callable[[int], Entry]
) -> Sidecar:
    """Writes a shard of the samples that `draw` makes of their positions; those of which none can be made are
    counted drops.
    """
    wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
    packages = ("numpy", *picture_packages(config))
    with ShardCommit(folder, job.name, job.fingerprint, job.inputs, packages) as commit:
        with tar_shard(commit) as samples, sample_maker(make, job.careful_sec) as made:
            for position in wanted:
                key = sample_key(position)
                try:
                    members = made(key, *draw(position))
                except BadEntry as error:
                    commit.drop(key, error.reason, error.detail)
                else:
                    samples.write(key, members)
        commit.check_drops(config.max_drop_fraction)
        commit.write_drops()
        return commit.commit(f"{job.name}.tar")
