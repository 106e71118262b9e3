"""Url lists -> raw image-text shards, by img2dataset, one shard at a time (the only file that imports it).

Its own statuses become counted drops; its images, which arrive in any order, are written in the order of
keys. Every row of the list ends up as a sample or as a drop.
"""

import io
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal
from urllib.parse import urljoin

from pydantic import BaseModel, ConfigDict, Field

from pipelines.pool import ActorsConfig, ShardJob
from pipelines.storage import Folder
from pipelines.store import ShardCommit, ShardError, Sidecar, canonical_json
from pipelines.tars import tar_shard

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

PACKAGES = ("img2dataset", "opencv-python-headless", "pillow")
SIZES = ("width", "height", "original_width", "original_height")

_RESIZING = threading.Lock()
"""img2dataset's Resizer points the process's stdout and stderr to nowhere for the length of a call: two at
once would leave them there.
"""


class IngestConfig(BaseModel):
    """Downloads and resizes images."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_size: int | None = Field(default=32, ge=1)
    """Side in pixels that images are brought to; None keeps their size."""
    resize: Literal["center_crop", "border", "keep_ratio", "keep_ratio_largest"] = "center_crop"
    """How, in img2dataset's words."""
    encode: Literal["png", "jpg", "webp"] = "png"
    """Format of the stored images; png is lossless."""
    quality: int = Field(default=6, ge=0, le=100)
    """Compression level 0 to 9 for png, quality 0 to 100 otherwise."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Images of more pixels, also after they are scaled up, are dropped before they are decoded. Pillow reads
    no header that tells of more than the largest value.
    """
    timeout_sec: int = Field(default=10, ge=1)
    """Of one download."""
    retries: int = Field(default=1, ge=0)
    """Further attempts at a failed download."""
    num_threads: int = Field(default=8, ge=1)
    """Downloads at the same time in each actor. Changes no bytes."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """A shard that loses more than this fails instead: an outage is not a data set. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """Its pool. Changes no bytes."""


def image_fields(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of an image, wherever it comes from."""
    names = {"image_size", "resize", "encode", "quality", "max_pixels"}
    return {f"ingest.{name}": value for name, value in config.model_dump(mode="json", include=names).items()}


def fingerprint_fields(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of downloaded shards."""
    return image_fields(config)


class BadImage(ValueError):
    """Bytes that become no image; `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"[{reason}] {detail}")
        self.reason, self.detail = reason, detail


class ImageFitter:
    """Image bytes -> (the image in the configured size and encoding, its sizes), by img2dataset's Resizer.

    The result has 8 bits and three channels: transparency is laid over white, grey, palettes, CMYK and 16-bit
    channels are converted, EXIF orientation is applied, animations give their first frame. Colour profiles
    are ignored. May be called from several threads, which take turns.

    Raises:
        BadImage: undecodable_image (also where it is cut short), too_many_pixels, failed_to_resize.
    """

    def __init__(self, config: IngestConfig):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        from img2dataset.resizer import Resizer

        self.config = config
        self._resizer = Resizer(
            image_size=config.image_size or 0,
            resize_mode="no" if config.image_size is None else config.resize,
            resize_only_if_bigger=False,
            encode_quality=config.quality,
            encode_format=config.encode,
        )

    def __call__(self, data: bytes) -> tuple[bytes, dict[str, int]]:
        plain = self._plain(data)
        with _RESIZING:
            encoded, *sizes, message = self._resizer(io.BytesIO(plain))
        if message is not None:
            reason = "undecodable_image" if "decod" in message else "failed_to_resize"
            raise BadImage(reason, message)
        return encoded, dict(zip(SIZES, sizes, strict=True))

    def _plain(self, data: bytes) -> bytes:
        """The bytes themselves where the Resizer reads them as they are meant, else a BMP of the same
        picture.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as image:
                self._check_pixels(*image.size)
                if not _is_complete(image, data):
                    image.load()  # raises where it is cut short
                if _is_plain(image, data):
                    return data
                stream = io.BytesIO()
                _to_rgb(image).save(stream, "BMP")
                return stream.getvalue()
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage("too_many_pixels", str(error)) from error
        except Exception as error:
            # what Pillow says of unknown formats names the object's address
            detail = "no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise BadImage("undecodable_image", detail) from error

    def _check_pixels(self, width: int, height: int) -> None:
        scaled = width * height
        if self.config.image_size is not None and self.config.resize in ("center_crop", "keep_ratio"):
            # the shorter side is brought to image_size: a line of pixels grows by its square
            scaled *= (self.config.image_size / min(width, height)) ** 2
        if max(width * height, scaled) > self.config.max_pixels:
            raise BadImage(
                "too_many_pixels",
                f"{width} x {height}, scaled to {scaled:,.0f} pixels; max_pixels {self.config.max_pixels:,}",
            )


def _is_complete(image: "Image.Image", data: bytes) -> bool:
    """Whether the file has its end mark. OpenCV fills up a JPEG cut short with grey and says nothing."""
    match image.format:
        case "JPEG" | "MPO":
            return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
        case "PNG":
            return data.rfind(b"IEND") >= 0
        case "WEBP":
            return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return False


def _is_plain(image: "Image.Image", data: bytes) -> bool:
    """Whether OpenCV decodes it unchanged to upright 8-bit RGB, or RGBA that the Resizer lays over white."""
    match image.format:
        case "JPEG" | "MPO":
            return image.mode == "RGB" and _orientation(image) == 1
        case "PNG":
            # bit depth and colour type; Pillow shows 16 bits as 8
            plain = data[24:26] in (b"\x08\x02", b"\x08\x06")
            return plain and "transparency" not in image.info and b"eXIf" not in data
        case "WEBP":
            return not getattr(image, "is_animated", False) and _orientation(image) == 1
    return False


def _orientation(image: "Image.Image") -> int:
    return image.getexif().get(0x0112, 1) if image.info.keys() & {"exif", "xmp"} else 1


def _to_rgb(image: "Image.Image") -> "Image.Image":
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would cut off all above 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("undecodable_image", "floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def drop_reason(status: str, message: str) -> str:
    """img2dataset's status and message -> a short reason that can be counted."""
    if code := re.match(r"HTTP Error (\d+)", message):
        return f"http_{code[1]}"
    if ours := re.match(r"\[(\w+)\]", message):
        return ours[1]
    match status, message:
        case "failed_to_download", m if "X-Robots-Tag" in m:
            return "robots_disallowed"
        case "failed_to_download", m if "timed out" in m:
            return "timeout"
    return status


class _Spool:
    """Takes the place of img2dataset's writers: appends images to one scratch file as they arrive and
    remembers where each lies, so that they can be written in order.
    """

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._places: dict[int, tuple[int, int]] = {}
        self.records: dict[int, dict[str, Any]] = {}
        """What img2dataset says of each row, by position."""

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        position = int(key)
        self.records[position] = meta
        if img_str is not None:
            self._places[position] = (self._stream.tell(), len(img_str))
            self._stream.write(img_str)

    def close(self) -> None:
        self._stream.flush()

    def image(self, position: int) -> bytes:
        offset, size = self._places[position]
        self._stream.seek(offset)
        return self._stream.read(size)


class IngestWorker:
    """Makes `NAME.tar` and `NAME.drops.parquet` from `NAME.parquet` (key, url, caption, anything more goes
    into the JSON).

    Args:
        folder: of the stage.
        source: folder of the url lists.
        config: the stage's.
        base_url: what relative urls are relative to.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, source: Folder, config: IngestConfig, base_url: str = ""):
        self.folder, self.source, self.config, self.base_url = folder, source, config, base_url
        self.fitter = ImageFitter(config)

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow.parquet as pq

        with self.source.open(f"{job.name}.parquet") as stream:
            rows = pq.read_table(stream)
        with (
            ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, PACKAGES) as commit,
            self.folder.staging(f"{job.name}.downloads") as scratch,
            (scratch / "images").open("w+b") as stream,
        ):
            spool = _Spool(stream)
            self._download(rows, scratch, spool)
            self._write(rows, spool, commit)
            commit.check_drops(self.config.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _resize(self, stream: io.BytesIO, boxes: None) -> tuple[Any, ...]:
        """What img2dataset calls where it would call its Resizer."""
        try:
            data, sizes = self.fitter(stream.getvalue())
        except BadImage as error:
            return None, None, None, None, None, str(error)
        return data, *(sizes[name] for name in SIZES), None

    def _download(self, rows: "pa.Table", scratch: Path, spool: _Spool) -> None:
        """Runs img2dataset on the rows as its shard 0."""
        import pyarrow as pa
        from img2dataset.downloader import Downloader

        urls = [urljoin(self.base_url, url) for url in rows["url"].to_pylist()]
        listed = pa.table({"url": urls})
        arrow = scratch / "urls.arrow"
        with pa.OSFile(str(arrow), "wb") as stream, pa.ipc.new_file(stream, listed.schema) as writer:
            writer.write_table(listed)
        # download_shard and not the object's own call, which prints exceptions and goes on
        Downloader(
            sample_writer_class=lambda *_: spool,
            resizer=self._resize,
            thread_count=self.config.num_threads,
            save_caption=False,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=["url"],
            timeout=self.config.timeout_sec,
            number_sample_per_shard=max(10, len(rows)),
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format=self.config.encode,
            retries=self.config.retries,
            user_agent_token="img2dataset",
            disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
        ).download_shard((0, str(arrow)))

    def _write(self, rows: "pa.Table", spool: _Spool, commit: ShardCommit) -> None:
        """Samples and drops in the order of keys."""
        if lost := sorted(set(range(len(rows))) - spool.records.keys()):
            key = rows["key"][lost[0]].as_py()
            raise ShardError(
                f"shard {commit.name}: img2dataset reports nothing about {len(lost)} of {len(rows)} rows, "
                f"first {key}; re-run"
            )
        with tar_shard(commit) as samples:
            for position, row in enumerate(rows.to_pylist()):
                key, record = row.pop("key"), spool.records[position]
                if record["status"] != "success":
                    message = record["error_message"] or ""
                    commit.drop(key, drop_reason(record["status"], message), message)
                    continue
                caption = row.pop("caption")
                metadata = {"key": key, **row, **{name: record[name] for name in SIZES}}
                members = {"txt": caption.encode(), "json": canonical_json(metadata).encode()}
                samples.write(key, {self.config.encode: spool.image(position), **members})
