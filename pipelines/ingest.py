"""Url lists -> raw image-text shards, by img2dataset, one shard at a time (the only file that imports it).

Its own statuses become counted drops; its tar, whose order depends on which download came first, is rewritten
in ours. Every row of
the list ends up as a sample or as a drop.
"""

import os
import re
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin

from pydantic import BaseModel, ConfigDict, Field

from pipelines.pool import ActorsConfig, ShardJob
from pipelines.store import ShardCommit, ShardError, Sidecar, canonical_json, tar_shard

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGES = ("img2dataset", "webdataset", "opencv-python-headless")


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


def fingerprint_fields(config: IngestConfig) -> dict[str, Any]:
    """What decides the bytes."""
    fields = config.model_dump(mode="json", include={"image_size", "resize", "encode", "quality"})
    return {f"ingest.{name}": value for name, value in fields.items()}


def drop_reason(status: str, message: str) -> str:
    """img2dataset's status and message -> a short reason that can be counted."""
    if code := re.match(r"HTTP Error (\d+)", message):
        return f"http_{code[1]}"
    match status, message:
        case "failed_to_download", m if "X-Robots-Tag" in m:
            return "robots_disallowed"
        case "failed_to_download", m if "timed out" in m:
            return "timeout"
        case "failed_to_resize", m if "decod" in m.lower():
            return "undecodable_image"
    return status


class IngestWorker:
    """Makes `NAME.tar` and `NAME.drops.parquet` from `NAME.parquet` (key, url, caption, anything more goes
    into the JSON).

    Args:
        folder: of the stage.
        source: folder of the url lists.
        config: the stage's.
        base_url: what relative urls are relative to.
    """

    def __init__(self, folder: Path, source: Path, config: IngestConfig, base_url: str = ""):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        from img2dataset.resizer import Resizer

        self.folder, self.source, self.config, self.base_url = folder, source, config, base_url
        self.resizer = Resizer(
            image_size=config.image_size or 0,
            resize_mode="no" if config.image_size is None else config.resize,
            resize_only_if_bigger=False,
            encode_quality=config.quality,
            encode_format=config.encode,
        )

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow.parquet as pq

        rows = pq.read_table(self.source / f"{job.name}.parquet")
        with (
            ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, PACKAGES) as commit,
            tempfile.TemporaryDirectory(prefix=f".{job.name}.", suffix=".tmpdir", dir=self.folder) as scratch,
        ):
            statuses = self._download(rows, Path(scratch), job.name)
            self._rewrite(rows, statuses, Path(scratch), commit)
            commit.check_drops(self.config.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _download(self, rows: "pa.Table", scratch: Path, name: str) -> dict[int, dict[str, Any]]:
        """Runs img2dataset on the rows as its shard 0; returns its record of each row by position."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from img2dataset.downloader import Downloader
        from img2dataset.writer import WebDatasetSampleWriter

        urls = [urljoin(self.base_url, url) for url in rows["url"].to_pylist()]
        listed = pa.table({"url": urls, "caption": rows["caption"]})
        arrow = scratch / "urls.arrow"
        with pa.OSFile(str(arrow), "wb") as stream, pa.ipc.new_file(stream, listed.schema) as writer:
            writer.write_table(listed)
        # download_shard and not the object's own call, which prints exceptions and goes on
        Downloader(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=self.resizer,
            thread_count=self.config.num_threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=["url", "caption"],
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
        records = pq.read_table(scratch / "00000.parquet").to_pylist()
        statuses = {int(record["key"]): record for record in records}
        if lost := sorted(set(range(len(rows))) - statuses.keys()):
            key = rows["key"][lost[0]].as_py()
            raise ShardError(
                f"shard {name}: img2dataset reports nothing about {len(lost)} of {len(rows)} rows, "
                f"first {key}; re-run"
            )
        return statuses

    def _rewrite(
        self, rows: "pa.Table", statuses: dict[int, dict[str, Any]], scratch: Path, commit: ShardCommit
    ) -> None:
        """img2dataset's tar, members in order of arrival -> ours, in order of keys and without dates."""
        with tarfile.open(scratch / "00000.tar") as archive, tar_shard(commit) as samples:
            images = {
                int(info.name.partition(".")[0]): info
                for info in archive
                if info.name.endswith("." + self.config.encode)
            }
            for position, row in enumerate(rows.to_pylist()):
                key, record = row.pop("key"), statuses[position]
                if record["status"] != "success":
                    message = record["error_message"] or ""
                    commit.drop(key, drop_reason(record["status"], message), message)
                    continue
                if position not in images:
                    raise ShardError(
                        f"shard {commit.name}, key {key}: img2dataset reports success, wrote no image; re-run"
                    )
                stream = archive.extractfile(images[position])
                assert stream is not None
                caption = row.pop("caption")
                sizes = {
                    name: record[name] for name in ("width", "height", "original_width", "original_height")
                }
                metadata = canonical_json({"key": key, **row, **sizes}).encode()
                samples.write(
                    key, {self.config.encode: stream.read(), "txt": caption.encode(), "json": metadata}
                )
