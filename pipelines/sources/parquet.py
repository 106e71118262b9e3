"""Parquet files that hold images and captions (the layout of Hugging Face data sets) -> raw image-text
shards.

Every row ends as a sample or as a counted drop. Row groups are read as a stream, so memory holds a few rows
and the page of the file they lie on.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, sample_key, shard_name
from pipelines.shards.tars import tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import InputFile, find_inputs
from pipelines.sources.raw_samples import (
    OWN_FIELDS,
    PACKAGES,
    BadEntry,
    SampleMaker,
    free_names,
    sample_maker,
)
from repfusion.config import Config

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8
BUFFER_BYTES = 1 << 20
RESERVED = OWN_FIELDS | {"source_row", "source_path"}


class ParquetConfig(Config):
    """Parquet files with images in them."""

    kind: Literal["parquet"] = "parquet"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """A .parquet file, a folder of them or a pattern such as `data/train-*.parquet`; local or any fsspec URL.
    Several files are read in the order of their names.
    """
    image_column: str = "image"
    """Column of encoded images: binary, or a struct with a binary field `bytes` and perhaps the text `path`.
    """
    caption_column: str = "caption"
    """Column of captions."""
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
    fields = config.model_dump(mode="json", exclude={"path", "options"})
    return {**flatten(fields, "source."), **image_fields(ingest)}


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
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.file, self.config = file, config
        self._stream = file.folder(config.options).open(file.base)
        try:
            # without a buffer a column of a row group is read whole: gigabytes, where groups are large
            self.parquet = pq.ParquetFile(self._stream, buffer_size=BUFFER_BYTES)
            self._check_columns()
        except (pa.ArrowException, OSError, ValueError) as error:
            self._stream.close()
            if isinstance(error, pa.ArrowException | OSError) and _is_damage(error):
                raise ValueError(f"source.path: {file.url} is not readable as parquet: {error}") from error
            raise

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def _check_columns(self) -> None:
        config, schema = self.config, self.parquet.schema_arrow
        extra = ("text, numbers, truth values, lists or structs", _fits_json)
        expected = [
            (config.image_column, "binary or a struct with a binary field 'bytes'", _holds_images),
            (config.caption_column, "text", _holds_text),
            *((name, *extra) for name in config.extra_columns),
        ]
        for name, kind, fits in expected:
            if name not in schema.names:
                raise ValueError(f"source: {self.file.url} has no column {name!r}; it has {schema.names}")
            if not fits(schema.field(name).type):
                raise ValueError(
                    f"source: column {name!r} of {self.file.url} is {schema.field(name).type}; "
                    f"expected {kind}"
                )

    def read(self, wanted: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows at ascending positions within the file; only the row groups that hold one are read."""
        config = self.config
        columns = list(dict.fromkeys([config.image_column, config.caption_column, *config.extra_columns]))
        sizes = (
            self.parquet.metadata.row_group(group).num_rows for group in range(self.parquet.num_row_groups)
        )
        first = 0
        for group, size in enumerate(sizes):
            if _within(wanted, first, first + size):
                start = first
                for batch in self.parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in _within(wanted, start, start + len(batch)):
                        yield row, {name: batch[name][row - start].as_py() for name in columns}
                    start += len(batch)
                    if start > wanted[-1]:
                        return
            first += size


def _within(wanted: range, start: int, stop: int) -> range:
    """The wanted positions from `start` to before `stop`."""
    return wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]


def _is_damage(error: Exception) -> bool:
    """Whether an error is about a file's content. Arrow has OSErrors for that too, of no further kind or
    number.
    """
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def _holds_images(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and _holds_images(fields["bytes"])
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_null(kind)
    )


def _holds_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _fits_json(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_fits_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return plain or _holds_text(kind)


def _finite(value: Any) -> Any:
    """JSON has no NaN, which is how tables made by pandas say that there is none."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case list():
            return [_finite(item) for item in value]
        case dict():
            return {name: _finite(item) for name, item in value.items()}
    return value


class ParquetWorker:
    """Makes `NAME.tar` from rows of parquet files. A key is the row's position over all files; the json says
    `source_file`, `source_row` in it and, where the image has one, `source_path`.

    Rows that stand before a shard in its first row group are read past.

    Reasons of drops: no_image, no_caption, and those of ImageFitter.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: ParquetConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        parts: Sequence[Part] = job.arguments.get("parts") or list_parts(self.config)
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow", *PACKAGES)
        ) as commit:
            with tar_shard(commit) as samples, sample_maker(self._make, job.careful_sec) as make:
                for position, entry in self._read(parts, wanted):
                    key = sample_key(position)
                    try:
                        members = make(key, *entry)
                    except BadEntry as error:
                        metadata = entry[2]
                        place = f"{metadata['source_file']}, row {metadata['source_row']}"
                        commit.drop(key, error.reason, f"{place}: {error.detail}")
                    else:
                        samples.write(key, members)
            commit.check_drops(self.ingest.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _read(
        self, parts: Sequence[Part], wanted: range
    ) -> Iterator[tuple[int, tuple[bytes | None, str | None, dict[str, Any]]]]:
        """Position, and image, caption and metadata, of the wanted rows."""
        import pyarrow as pa

        for part in parts:
            own = _within(wanted, part.start, part.stop)
            inside = range(own.start - part.first, own.stop - part.first, own.step)
            try:
                with _Rows(part.file, self.config) as rows:
                    for row, values in rows.read(inside):
                        yield part.first + row, self._entry(part.file, row, values)
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                detail = " ".join(str(error).split())
                raise ShardError(f"{part.file.url}: damaged ({detail}); replace it") from error

    def _entry(
        self, file: InputFile, row: int, values: dict[str, Any]
    ) -> tuple[bytes | None, str | None, dict[str, Any]]:
        config = self.config
        metadata = {name: _finite(values[name]) for name in config.extra_columns}
        metadata |= {"source_file": file.name, "source_row": row}
        image = values[config.image_column]
        if isinstance(image, dict):
            if image.get("path"):
                metadata["source_path"] = image["path"]
            image = image["bytes"]
        return image, values[config.caption_column], metadata
