"""Url lists -> raw image-text shards, by img2dataset, one shard at a time (the only file that imports it).

Its requests go through `downloads`, its images through `ImageFitter`; what arrives in any order is written in
the order of keys. Every row of the list ends up as a sample or as a counted drop.
"""

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, Self
from urllib.parse import urljoin

from pydantic import Field, model_validator

from pipelines.lists.values import json_values
from pipelines.runtime.careful import KILLED, KilledError, guarded
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.parquet import parse_parquet, read_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.sources.web.downloads import DownloadLimits, Downloads, ascii_url, is_transient
from repfusion.config import Config
from repfusion.files import canonical_json
from repfusion.images.decode import EncodedImage
from repfusion.images.limits import MAX_PIXELS, BadImage
from repfusion.video.forms import ClipForm

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGES = ("img2dataset", "opencv-python-headless", "pillow")
SIZES = ("width", "height", "original_width", "original_height")

_RESIZING = threading.Lock()
"""img2dataset's Resizer points the process's stdout and stderr to nowhere for the length of a call: two at
once would leave them there.
"""


class IngestConfig(Config):
    """Downloads and resizes images."""

    image_size: int | None = Field(default=64, ge=1)
    """Side in pixels that images are brought to; None keeps their size. Those of tars, folders and parquet
    then stay as they are, byte for byte, if they are JPEG, PNG or WebP that every decoder reads as the same
    upright 8-bit RGB; others are decoded, and stored as `encode` says.
    """
    resize: Literal["center_crop", "border", "keep_ratio", "keep_ratio_largest"] = "center_crop"
    """How, in img2dataset's words."""
    encode: Literal["png", "jpg", "webp"] = "png"
    """Format of the stored images; png is lossless."""
    quality: int = Field(default=6, ge=0, le=100)
    """Compression level 0 to 9 for png, quality 0 to 100 otherwise."""
    clips: ClipForm | None = None
    """Takes what tars, folders and parquet hold for clips (mp4, webm, gif) and brings them to this length and
    rate, a square from the middle of their frames to `image_size`; stored as `KEY.mp4`, whatever `encode`
    says. None takes it for images.
    """
    max_pixels: int = Field(default=100_000_000, ge=1, le=MAX_PIXELS)
    """Images of more pixels, also after they are scaled up, are dropped before they are decoded. Pillow reads
    no header that tells of more than the largest value.
    """
    max_download_bytes: int = Field(default=50 << 20, ge=1)
    """Larger files are dropped, downloaded or not, whatever their length is said to be. Up to twice
    `num_threads` of them are in memory for each shard.
    """
    allow_private_addresses: bool = False
    """Whether hosts may be private, loopback or link-local, also by way of a redirect."""
    timeout_sec: int = Field(default=10, ge=1)
    """Longest time of one request, from connecting to the last byte. Changes no bytes."""
    retries: int = Field(default=1, ge=0)
    """Further attempts at a download that failed for a reason that may pass: a timeout, a broken connection,
    HTTP 429 or 5xx. Changes no bytes.
    """
    retry_backoff_sec: float = Field(default=1.0, ge=0)
    """Wait before the second attempt, doubled for each further one; a longer Retry-After is kept, up to 30 s.
    Changes no bytes.
    """
    max_requests_per_sec_per_host: float | None = Field(default=None, gt=0)
    """Limit of the whole stage where `actors.num_actors` is set, else of each actor. Changes no bytes."""
    num_threads: int = Field(default=8, ge=1)
    """Downloads at the same time for each shard; an actor works on two shards. Changes no bytes."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """A shard that loses more than this fails instead: an outage is not a data set. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that downloads. Changes no bytes."""

    @model_validator(mode="after")
    def _has_fit_quality(self) -> Self:
        if self.encode == "png" and self.quality > 9:
            raise ValueError(f"quality {self.quality} with encode png, whose compression levels are 0 to 9")
        return self

    @model_validator(mode="after")
    def _clips_are_cropped(self) -> Self:
        if self.clips is not None and self.resize != "center_crop":
            raise ValueError(f"resize {self.resize} with clips, whose frames are cut by center_crop alone")
        return self


def image_fields(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of an image or a clip, wherever it comes from."""
    names = {"image_size", "resize", "encode", "quality", "max_pixels", "max_download_bytes"}
    if config.clips is not None:
        names = {"image_size", "clips", "max_pixels", "max_download_bytes"}
    return flatten(config.model_dump(mode="json", include=names), "ingest.")


def fingerprint_fields(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes of downloaded shards."""
    return image_fields(config) | {"ingest.allow_private_addresses": config.allow_private_addresses}


class ImageFitter:
    """Image bytes -> (the image in the configured size and encoding, its sizes), by img2dataset's Resizer.

    The result has 8 bits and three channels, as `repfusion.images` decodes it. May be called from several
    threads, which take turns.

    Raises:
        BadImage: undecodable_image (also where it is cut short), too_many_pixels, too_many_scans,
            slow_to_decode, failed_to_resize.
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
        image = EncodedImage(data, self.config.max_pixels)
        self._check_scaled(*image.size)
        found = None
        # OpenCV reads these as Pillow does, and faster; of a broken WebP it makes up the rest
        if image.plain_extension in ("jpg", "png"):
            found = self._resize(data)
        if found is None:  # not plain, or one of a few PNGs at which OpenCV is the stricter
            stream = io.BytesIO()
            image.decode().save(stream, "BMP")
            found = self._resize(stream.getvalue())
        if found is None:
            raise BadImage("undecodable_image", "OpenCV does not read it")
        return found

    def _resize(self, plain: bytes) -> tuple[bytes, dict[str, int]] | None:
        """None where OpenCV does not read the bytes."""
        with _RESIZING:
            encoded, *sizes, message = self._resizer(io.BytesIO(plain))
        if message is None:
            return encoded, dict(zip(SIZES, sizes, strict=True))
        if "decod" in message:
            return None
        raise BadImage("failed_to_resize", message)

    def _check_scaled(self, width: int, height: int) -> None:
        if self.config.image_size is None or self.config.resize not in ("center_crop", "keep_ratio"):
            return
        # the shorter side is brought to image_size: a line of pixels grows by its square
        scaled = width * height * (self.config.image_size / min(width, height)) ** 2
        if scaled > self.config.max_pixels:
            raise BadImage(
                "too_many_pixels",
                f"{width} x {height}, scaled to {scaled:,.0f} pixels; max_pixels {self.config.max_pixels:,}",
            )


def drop_reason(status: str, message: str) -> tuple[str, str]:
    """img2dataset's status and message -> (a short reason that can be counted, the detail)."""
    if ours := re.fullmatch(r"\[(\w+)\] (.*)", message, re.DOTALL):
        return ours[1], ours[2]
    if "X-Robots-Tag" in message:
        return "robots_disallowed", message
    if message.startswith("unknown url type"):
        return "invalid_url", "no scheme"
    return status, message


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
        if img_str is not None:
            self._places[position] = (self._stream.tell(), len(img_str))
            self._stream.write(img_str)
        # last: img2dataset goes on where this raises, and a row without a record is noticed
        self.records[position] = meta

    def close(self) -> None:
        self._stream.flush()

    def __getitem__(self, position: int) -> tuple[dict[str, Any], bytes | None]:
        """A row's record, and its image if it has one."""
        if position not in self._places:
            return self.records[position], None
        offset, size = self._places[position]
        self._stream.seek(offset)
        return self.records[position], self._stream.read(size)


@dataclass(frozen=True)
class _Earlier:
    """A complete shard that is made again for some of the samples it lacks."""

    sidecar: Sidecar
    drops: dict[str, tuple[str, str]]
    """Key -> reason and detail."""

    @classmethod
    def read(cls, folder: Folder, job: ShardJob, keys: list[str]) -> "_Earlier | None":
        """None where there is no such shard, it was made from something else, or a byte of it is not as it
        was.
        """
        sidecar = read_sidecar(folder, job.name)
        if sidecar is None or (sidecar.fingerprint, sidecar.inputs) != (job.fingerprint, job.inputs):
            return None
        try:
            found = [key for key, _ in read_samples(folder, sidecar.file, sidecar, {"txt"})]
            drops = {}
            for name, described in sidecar.files.items():
                data = folder.read(name)
                if hashlib.sha256(data).hexdigest() != described.sha256:
                    return None
                rows = parse_parquet(data).to_pylist()
                drops = {row["key"]: (row["reason"], row["detail"]) for row in rows}
        except (ShardError, FileNotFoundError):
            return None
        return cls(sidecar, drops) if sorted([*found, *drops]) == sorted(keys) else None

    def dropped_for(self, reasons: Container[str]) -> list[str]:
        """Keys, in order."""
        return sorted(key for key, (reason, _) in self.drops.items() if reason in reasons)


def _check_delivered(commit: ShardCommit) -> None:
    """A server that the driver itself runs has all that it is asked for. It falls silent when the driver was
    killed, or has no time: neither says anything of a sample.

    Raises:
        ConnectionError: where a sample failed for a reason that will pass; the shard is tried again.
    """
    missed = [(key, detail) for key, reason, detail in commit.drops if is_transient(reason)]
    if missed:
        key, detail = missed[0]
        raise ConnectionError(
            f"shard {commit.name}: the driver's server did not deliver {len(missed)} images, first {key}: "
            f"{detail}"
        )


def _resize(
    fit: Callable[[bytes], tuple[bytes, dict[str, int]]], stream: io.BytesIO, boxes: None
) -> tuple[Any, ...]:
    """What img2dataset calls where it would call its Resizer."""
    try:
        data, sizes = fit(stream.getvalue())
    except BadImage as error:
        return None, None, None, None, None, str(error)
    except KilledError as error:
        return None, None, None, None, None, f"[{KILLED}] {error}"
    return data, *(sizes[name] for name in SIZES), None


class IngestWorker:
    """Makes `NAME.tar` and `NAME.drops.parquet` from `NAME.parquet` (key, url, caption, anything more goes
    into the JSON).

    A job with the argument `retry`, a list of reasons, downloads only the samples that the complete shard
    lacks for one of them and keeps the others' bytes; without a sound shard it makes the whole.

    Args:
        folder: of the stage.
        source: folder of the url lists.
        config: the stage's.
        base_url: what relative urls are relative to.
        own_server: whether that is a server of the driver, which delivers everything in the end.
        num_actors: between how many the permitted requests per host are divided.
    """

    concurrency: ClassVar[int] = 2

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        config: IngestConfig,
        base_url: str = "",
        num_actors: int = 1,
        own_server: bool = False,
    ):
        self.folder, self.source, self.config = folder, source, config
        self.base_url, self.own_server = base_url, own_server
        self.fitter = ImageFitter(config)
        rate = config.max_requests_per_sec_per_host
        self.downloads = Downloads(
            DownloadLimits(
                max_bytes=config.max_download_bytes,
                allow_private_addresses=config.allow_private_addresses,
                retries=config.retries,
                backoff_sec=config.retry_backoff_sec,
                max_requests_per_sec_per_host=None if rate is None else rate / num_actors,
            )
        )

    def __call__(self, job: ShardJob) -> Sidecar:
        rows = read_parquet(self.source, f"{job.name}.parquet")
        keys: list[str] = rows["key"].to_pylist()
        tried, earlier = keys, None
        if reasons := job.arguments.get("retry"):
            earlier = _Earlier.read(self.folder, job, keys)
        if earlier is not None and not (tried := earlier.dropped_for(reasons)):
            return earlier.sidecar
        with (
            ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, PACKAGES) as commit,
            self.folder.staging(f"{job.name}.downloads") as scratch,
            (scratch / "images").open("w+b") as stream,
        ):
            spool = _Spool(stream)
            urls = dict(zip(keys, rows["url"].to_pylist(), strict=True))
            with guarded(self.fitter, partial(ImageFitter, self.config), job.careful_sec) as fit:
                self._download([urls[key] for key in tried], scratch, spool, fit)
            if lost := [key for position, key in enumerate(tried) if position not in spool.records]:
                raise ShardError(
                    f"shard {job.name}: img2dataset reports nothing about {len(lost)} of {len(tried)} rows, "
                    f"first {lost[0]}; its actor's log may say why; re-run"
                )
            self._write(rows, tried, spool, earlier, commit)
            if self.own_server:
                _check_delivered(commit)
            commit.check_drops(self.config.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _absolute(self, url: str) -> str:
        try:
            return ascii_url(urljoin(self.base_url, url))
        except ValueError:
            return ""  # http://[ and its like, of which img2dataset says something else each

    def _download(
        self,
        urls: list[str],
        scratch: Path,
        spool: _Spool,
        fit: Callable[[bytes], tuple[bytes, dict[str, int]]],
    ) -> None:
        """Runs img2dataset on the addresses as its shard 0."""
        import pyarrow as pa
        from img2dataset.downloader import Downloader

        listed = pa.table({"url": pa.array([self._absolute(url) for url in urls], pa.string())})
        arrow = scratch / "urls.arrow"
        with pa.OSFile(str(arrow), "wb") as stream, pa.ipc.new_file(stream, listed.schema) as writer:
            writer.write_table(listed)
        downloader = Downloader(
            sample_writer_class=lambda *_: spool,
            resizer=partial(_resize, fit),
            thread_count=self.config.num_threads,
            save_caption=False,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=["url"],
            timeout=self.config.timeout_sec,
            number_sample_per_shard=max(10, len(urls)),
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format=self.config.encode,
            retries=0,  # its own try again at once, whatever the failure
            user_agent_token="img2dataset",
            disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
        )
        with self.downloads.installed():
            # and not the object's own call, which prints exceptions and goes on
            downloader.download_shard((0, str(arrow)))

    def _write(
        self,
        rows: "pa.Table",
        tried: list[str],
        spool: _Spool,
        earlier: _Earlier | None,
        commit: ShardCommit,
    ) -> None:
        """Samples and drops in the order of keys, those that were not tried as they were."""
        positions = {key: position for position, key in enumerate(tried)}
        kept: Iterator[tuple[str, dict[str, bytes]]] = iter(())
        if earlier is not None:
            kept = read_samples(self.folder, earlier.sidecar.file, earlier.sidecar)
        with tar_shard(commit) as samples:
            for row in rows.to_pylist():
                key = row.pop("key")
                if key in positions:
                    record, image = spool[positions[key]]
                    if image is None:
                        commit.drop(key, *drop_reason(record["status"], record["error_message"] or ""))
                    else:
                        samples.write(key, self._members(key, row, record, image))
                elif earlier is not None and key in earlier.drops:
                    commit.drop(key, *earlier.drops[key])
                else:
                    samples.write(*next(kept))
            # runs to the end of the file, where its digest is compared
            assert next(kept, None) is None

    def _members(
        self, key: str, row: dict[str, Any], record: dict[str, Any], image: bytes
    ) -> dict[str, bytes]:
        caption = row.pop("caption")
        metadata = json_values({"key": key, **row, **{name: record[name] for name in SIZES}})
        return {
            self.config.encode: image,
            "txt": caption.encode(),
            "json": canonical_json(metadata).encode(),
        }
