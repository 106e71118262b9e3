"""Parquet files that hold images and captions (the layout of Hugging Face data sets) -> raw image-text
shards.

Every row ends as a sample or as a counted drop. Row groups are read as a stream, so memory holds a few rows
and the page of the file they lie on.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.lists.captions import ALL_CAPTIONS, SeveralCaptions, lists_remedy, read_caption
from pipelines.lists.columns import Needed, caption_column, check_columns, json_column
from pipelines.lists.values import BadEntry, Undecodable, cells, is_binary
from pipelines.runtime.pool import ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.parquet import is_damage, open_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, sample_key, shard_name
from pipelines.shards.tars import tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import InputFile, find_inputs
from pipelines.sources.raw_samples import (
    OWN_FIELDS,
    SampleMaker,
    SourceImages,
    free_names,
    picture_packages,
    sample_maker,
    source_image_fields,
)
from repfusion.config import Config

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8
BUFFER_BYTES = 1 << 20
IMAGES_EXPECTED = "binary or a struct with a binary field 'bytes'"
RESERVED = OWN_FIELDS | {ALL_CAPTIONS, "source_row", "source_path"}


class ParquetConfig(Config):
    """Parquet files with images in them."""

    kind: Literal["parquet"] = "parquet"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """A .parquet file, a folder of them or a pattern such as `data/train-*.parquet` or
    `data/{0000..0127}.parquet`; local or any fsspec URL. Several files are read in the order of their names.
    """
    image_column: str = "image"
    """Column of encoded images: binary, or a struct with a binary field `bytes` and perhaps the text `path`.
    """
    images: SourceImages = ()
    """Columns of encoded images, the source pictures of editing samples, in the order in which the caption
    counts them.
    """
    caption_column: str = "caption"
    """Column of captions."""
    several_captions: SeveralCaptions = "whole"
    """What a caption of several lines, or a list of captions, means: `whole` is one caption, and refuses
    lists; `first` takes the first; `all` takes it too and keeps all as `all_captions` in the sample's json,
    for a captions column to draw from.
    """
    extra_columns: Annotated[tuple[str, ...], free_names(RESERVED)] = ()
    """Further columns that go into each sample's json, such as alternative captions: text, numbers, truth
    values, lists and structs of these.
    """
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one file."""

    file: InputFile
    first: int
    """Where the file's first row stands among those of all files."""
    start: int
    stop: int
    """Rows, counted over all files."""

    @property
    def identity(self) -> str:
        return f"{self.file.size}:{self.file.stamp}:{self.start - self.first}-{self.stop - self.first}"


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files, read by `ingest`."""

    config: ParquetConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields = fingerprint_fields(self.config, ingest)
        return [read_stage(ParquetWorker, self.config, fields, jobs(self.config), ingest, place)]

    def entries(self) -> Entries:
        names = [job.name for job in jobs(self.config)]
        return Entries(num_entries(self.config), names, partial(probe_jobs, self.config))


def fingerprint_fields(config: ParquetConfig, ingest: IngestConfig) -> dict[str, Any]:
    """What decides the bytes, beside the files themselves."""
    fields = config.model_dump(mode="json", exclude={"path", "options", "images"})
    return {**flatten(fields, "source."), **source_image_fields(config.images), **image_fields(ingest)}


def jobs(config: ParquetConfig) -> tuple[ShardJob, ...]:
    """Shards of `source.shard_size` rows over all files. Reads the files' footers.

    Raises:
        ValueError: where there is no file, or one lacks a column or has one of an unfit type.
    """
    parts = list_parts(config)
    ends = [part.stop for part in parts]
    total = ends[-1]
    made = []
    for index, start in enumerate(range(0, total, config.shard_size)):
        stop = min(start + config.shard_size, total)
        touched = parts[bisect_right(ends, start) : bisect_right(ends, stop - 1) + 1]
        own = tuple(
            Part(part.file, part.first, max(start, part.start), min(stop, part.stop)) for part in touched
        )
        inputs = {part.file.name: part.identity for part in own}
        made.append(ShardJob(shard_name(index), "", inputs, {"start": start, "stop": stop, "parts": own}))
    return tuple(made)


def num_entries(config: ParquetConfig) -> int:
    """Rows of all files; raises what `jobs` raises."""
    return list_parts(config)[-1].stop


def probe_jobs(config: ParquetConfig, wanted: int, offset: int = 0) -> tuple[ShardJob, ...]:
    """A job that reads about `wanted` rows, spread evenly."""
    parts = list_parts(config)
    total = parts[-1].stop
    step = max(1, total // wanted)
    arguments = {"start": offset % step, "stop": total, "step": step, "parts": tuple(parts)}
    return (ShardJob(shard_name(0), "", {}, arguments),)


def list_parts(config: ParquetConfig) -> list[Part]:
    """The files that have rows, each with all of them."""
    files = find_inputs(config.path, (".parquet",), "source.path", config.options)
    counts = []
    for file in files:
        with _Rows(file, config) as rows:
            counts.append(rows.parquet.metadata.num_rows)
    starts = accumulate(counts, initial=0)
    parts = [
        Part(file, start, start, start + count)
        for file, start, count in zip(files, starts, counts, strict=False)
        if count
    ]
    if not parts:
        raise ValueError(f"source.path: the {len(files)} files at {config.path} have no rows")
    return parts


class _Rows:
    """An open file whose columns are known to fit."""

    def __init__(self, file: InputFile, config: ParquetConfig):
        self.file, self.config = file, config
        self._opened = ExitStack()
        place = f"source.path: {file.url}"
        try:
            # without a buffer a column of a row group is read whole: gigabytes, where groups are large
            opened = open_parquet(file.folder(config.options), file.base, buffer_size=BUFFER_BYTES)
            self.parquet = self._opened.enter_context(opened)
            schema = self.parquet.schema_arrow
            check_columns(_needed(config), schema.names, place, lambda name: schema.field(name).type)
        # Arrow's errors over a damaged file have no common class; the file is closed whatever happens
        except Exception as error:
            self._opened.close()
            if is_damage(error):
                raise ValueError(f"{place} is not readable as parquet: {error}") from error
            raise

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def read(self, wanted: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows at ascending positions within the file; only the row groups that hold one are read."""
        config = self.config
        asked = (config.image_column, config.caption_column, *config.images, *config.extra_columns)
        columns = list(dict.fromkeys(asked))
        sizes = (
            self.parquet.metadata.row_group(group).num_rows for group in range(self.parquet.num_row_groups)
        )
        first = 0
        for group, size in enumerate(sizes):
            if _within(wanted, first, first + size):
                start = first
                for batch in self.parquet.iter_batches(
                    BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
                ):
                    for row in _within(wanted, start, start + len(batch)):
                        yield row, {name: cells(batch[name].slice(row - start, 1))[0] for name in columns}
                    start += len(batch)
                    if start > wanted[-1]:
                        return
            first += size


def _within(wanted: range, start: int, stop: int) -> range:
    """The wanted positions from `start` to before `stop`."""
    return wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]


def _needed(config: ParquetConfig) -> list[Needed]:
    return [
        Needed(config.image_column, "source.image_column", _holds_images, IMAGES_EXPECTED),
        *(Needed(name, "source.images", _holds_images, IMAGES_EXPECTED) for name in config.images),
        caption_column(config.caption_column, "source.caption_column", lists_remedy(config.several_captions)),
        *(json_column(name, "source.extra_columns") for name in config.extra_columns),
    ]


def _holds_images(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and is_binary(fields["bytes"])
    return is_binary(kind)


class ParquetWorker:
    """Makes `NAME.tar` from rows of parquet files. A key is the row's position over all files; the json says
    `source_file`, `source_row` in it and, where the image has one, `source_path`.

    Rows that stand before a shard in its first row group are read past.

    Reasons of drops: no_image, no_caption, undecodable_caption, not_text, undecodable_metadata,
    missing_source, broken_source, and those of ImageFitter.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: ParquetConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        parts: Sequence[Part] = job.arguments.get("parts") or list_parts(self.config)
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow", *picture_packages(self.ingest))
        ) as commit:
            with tar_shard(commit) as samples, sample_maker(self._make, job.careful_sec) as make:
                for position, file, row, values in self._read(parts, wanted):
                    key = sample_key(position)
                    try:
                        members = make(key, *self._entry(file, row, values))
                    except BadEntry as error:
                        commit.drop(key, error.reason, f"{file.name}, row {row}: {error.detail}")
                    else:
                        samples.write(key, members)
            commit.check_drops(self.ingest.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _read(
        self, parts: Sequence[Part], wanted: range
    ) -> Iterator[tuple[int, InputFile, int, dict[str, Any]]]:
        """Position, file, row in it and values of the wanted rows."""
        for part in parts:
            own = _within(wanted, part.start, part.stop)
            inside = range(own.start - part.first, own.stop - part.first, own.step)
            try:
                with _Rows(part.file, self.config) as rows:
                    for row, values in rows.read(inside):
                        yield part.first + row, part.file, row, values
            # Arrow's errors over a damaged file have no common class
            except Exception as error:
                if not is_damage(error):
                    raise
                detail = " ".join(str(error).split())
                raise ShardError(f"{part.file.url}: damaged ({detail}); replace it") from error

    def _entry(
        self, file: InputFile, row: int, values: dict[str, Any]
    ) -> tuple[bytes | None, str | None, dict[str, Any], list[bytes | None]]:
        """Image, caption, metadata and source pictures. Raises BadEntry."""
        config = self.config
        caption, fields = read_caption(values[config.caption_column], config.several_captions)
        metadata = {name: values[name] for name in config.extra_columns} | fields
        metadata |= {"source_file": file.name, "source_row": row}
        image = values[config.image_column]
        if isinstance(image, Undecodable):
            raise BadEntry("undecodable_metadata", f"the image's path: {image.detail}")
        if isinstance(image, dict):
            if path := image.get("path"):
                metadata["source_path"] = path
                if image["bytes"] is None:
                    raise BadEntry("no_image", f"no bytes, only the path {path}; a folder source reads files")
            image = image["bytes"]
        return image, caption, metadata, [_source_bytes(name, values[name]) for name in config.images]


def _source_bytes(name: str, cell: Any) -> bytes | None:
    """A source picture's bytes; None where the row has none. Raises BadEntry."""
    if isinstance(cell, Undecodable):
        raise BadEntry("broken_source", f"{name}: the image's path: {cell.detail}")
    return cell["bytes"] if isinstance(cell, dict) else cell
