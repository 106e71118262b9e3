"""Lists of image addresses and captions (parquet or csv, of any size) -> url lists of a shard's size, in
order and with keys.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, cast

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, sample_key
from pipelines.sources.base import Entries, download_stage, list_stage, numbered_entries
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.raw_samples import free_names
from repfusion.config import Config
from repfusion.files import digest_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KINDS = (".parquet", ".csv")
RESERVED = {"key", "url", "caption", "width", "height", "original_width", "original_height"}
"""Names that ingest gives to a sample's JSON."""
BATCH_ROWS = 1 << 14
CSV_BLOCK_BYTES = 1 << 20


class UrlsConfig(Config):
    """A list of addresses to download."""

    kind: Literal["urls"] = "urls"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """A .parquet or .csv file, a folder of them or a pattern such as `lists/part-*.parquet`; local or any
    fsspec URL. Several files are read in the order of their names.
    """
    url_column: str = "url"
    """The list's column of addresses."""
    caption_column: str = "caption"
    """The list's column of captions; an empty or missing one is dropped, and counted, by `curate`."""
    extra_columns: Annotated[tuple[str, ...], free_names(RESERVED)] = ()
    """Further columns (text, numbers, truth values, lists of text or whole numbers) that go into each
    sample's JSON, such as alternative captions.
    """
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that reads the list. Changes no bytes."""


@dataclass(frozen=True)
class UrlsSource:
    """A list of addresses, cut into shards and then downloaded."""

    config: UrlsConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        config, files = self.config, UrlList(self.config).files
        fields = config.model_dump(mode="json", exclude={"path", "options", "actors"})
        identities = [place.digests.url(file.url, config.options) for file in files]
        listed = list_stage(
            UrlListWorker,
            {"config": config, "files": files},
            flatten({**fields, "path": digest_of(identities)}, "source."),
            sum(file.rows for file in files),
            config.shard_size,
            config.actors,
            place,
        )
        return [listed, download_stage(listed, ingest, config.shard_size, place)]

    def entries(self) -> Entries:
        return numbered_entries(num_rows(self.config), self.config.shard_size)


@dataclass(frozen=True)
class ListFile:
    """A file of a list and its number of rows."""

    url: str
    rows: int


def find_files(config: UrlsConfig) -> list[str]:
    """The list's files, in the order of their names.

    Raises:
        ValueError: where there is none, or one of another kind.
    """
    import fsspec

    files, path = fsspec.core.url_to_fs(config.path, **config.options)
    if files.isdir(path):
        found = [name for name in files.ls(path, detail=False) if name.endswith(KINDS)]
    elif files.exists(path):
        found = [path]
    else:
        found = files.glob(path)
    if not found:
        raise ValueError(f"source.path: {config.path} leads to no file; expected .parquet or .csv url lists")
    for name in found:
        if not name.endswith(KINDS):
            raise ValueError(f"source.path: {name}: expected a name that ends in .parquet or .csv")
    return sorted(files.unstrip_protocol(name).removeprefix("file://") for name in found)


class UrlList:
    """The rows of a list over all its files, as tables with columns url, caption and the extra ones.

    Making one without `files` reads the footers of parquet files and all of csv files; memory stays bounded
    by a block of rows. Reading keeps its position, so that ascending calls read a csv file once.

    Raises:
        ValueError: for a list without files, and one that lacks a column or has one of an unfit type.
    """

    def __init__(self, config: UrlsConfig, files: Sequence[ListFile] | None = None):
        self.config = config
        self._parquet: tuple[str, pq.ParquetFile] | None = None
        if files is None:
            files = [ListFile(url, self._count(url)) for url in find_files(config)]
        self.files = tuple(files)
        self._starts = [0, *accumulate(file.rows for file in files)]
        self._range = range(0)
        """The rows that `_batches` runs over: a csv file, or a row group of a parquet file."""
        self._batches: Iterator[pa.Table] = iter(())
        self._batch: pa.Table | None = None
        self._first = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, wanted: range) -> "pa.Table":
        """The rows at ascending positions; of parquet files, only the row groups that hold one are read."""
        import pyarrow as pa

        pieces, done = [], 0
        while done < len(wanted):
            first, batch = self._batch_at(wanted[done])
            inside = wanted[done : bisect_left(wanted, first + len(batch))]
            if wanted.step == 1:
                pieces.append(batch.slice(inside[0] - first, len(inside)))
            else:
                pieces.append(batch.take([position - first for position in inside]))
            done += len(inside)
        try:
            return pa.concat_tables(pieces, promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise ValueError(
                f"source.extra_columns: the files of {self.config.path} disagree about a type: {error}"
            ) from error

    def _batch_at(self, position: int) -> tuple[int, "pa.Table"]:
        """The block of rows that holds a position, and the position of its first row."""
        if position not in self._range or position < self._first:
            self._seek(position)
        while self._batch is None or position >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError(
                    f"source.path: {self.config.path} ends before row {position:,} of {len(self):,}; "
                    "it changed since it was counted: run again"
                )
        return self._first, self._batch

    def _seek(self, position: int) -> None:
        index = bisect_right(self._starts, position) - 1
        start, url = self._starts[index], self.files[index].url
        if url.endswith(".csv"):
            self._range, self._batches = range(start, self._starts[index + 1]), self._read_csv(url)
        else:
            parquet = self._open_parquet(url)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            edges = list(accumulate(sizes, initial=start))
            group = bisect_right(edges, position) - 1
            self._range = range(edges[group], edges[group + 1])
            self._batches = self._read_group(parquet, url, group)
        self._first, self._batch = self._range.start, None

    def _open(self, url: str) -> BinaryIO:
        import fsspec

        files, path = fsspec.core.url_to_fs(url, **self.config.options)
        return cast(BinaryIO, files.open(path, "rb"))

    def _open_parquet(self, url: str) -> "pq.ParquetFile":
        import pyarrow.parquet as pq

        if self._parquet is None or self._parquet[0] != url:
            parquet = pq.ParquetFile(self._open(url))
            self._check_columns(url, parquet.schema_arrow.names)
            for name in self.config.extra_columns:
                if not _fits_json(kind := parquet.schema_arrow.field(name).type):
                    raise ValueError(
                        f"source.extra_columns: {name!r} of {url} is of type {kind}; expected "
                        "text, numbers, truth values or lists of text or whole numbers"
                    )
            self._parquet = (url, parquet)
        return self._parquet[1]

    def _count(self, url: str) -> int:
        if url.endswith(".csv"):
            return sum(len(batch) for batch in self._read_csv(url))
        rows = self._open_parquet(url).metadata.num_rows
        self._parquet = None
        return rows

    def _check_columns(self, url: str, names: Sequence[str]) -> None:
        for column in self._columns:
            if column not in names:
                raise ValueError(f"source: {url} has no column {column!r}; it has {list(names)}")

    @property
    def _columns(self) -> list[str]:
        config = self.config
        return list(dict.fromkeys([config.url_column, config.caption_column, *config.extra_columns]))

    def _read_group(self, parquet: "pq.ParquetFile", url: str, group: int) -> Iterator["pa.Table"]:
        import pyarrow as pa

        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=self._columns):
            yield self._named(pa.Table.from_batches([batch]), url)

    def _read_csv(self, url: str) -> Iterator["pa.Table"]:
        import pyarrow as pa
        from pyarrow import csv

        read = csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES)
        parse = csv.ParseOptions(newlines_in_values=True)
        # types that are guessed from the first block fail on a later one
        convert = csv.ConvertOptions(column_types=dict.fromkeys(self._columns, pa.string()))
        try:
            with self._open(url) as stream, csv.open_csv(stream, read, parse, convert) as batches:
                self._check_columns(url, batches.schema.names)
                for batch in batches:
                    yield self._named(pa.Table.from_batches([batch]), url)
        except pa.ArrowInvalid as error:
            raise ValueError(f"source.path: {url} is not readable as csv: {error}") from error

    def _named(self, batch: "pa.Table", url: str) -> "pa.Table":
        """Columns url and caption as text that is never null, and the extra ones."""
        import pyarrow as pa
        import pyarrow.compute as pc

        columns = {
            "url": batch[self.config.url_column].cast(pa.string()).fill_null(""),
            "caption": batch[self.config.caption_column].cast(pa.string()).fill_null(""),
        }
        for name in self.config.extra_columns:
            column = batch[name]
            if pa.types.is_floating(column.type):
                # JSON has no NaN, which is how tables made by pandas say that there is none
                column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
            columns[name] = column
        return pa.table(columns)


def _fits_json(kind: "pa.DataType") -> bool:
    from pyarrow import types

    def plain(kind: "pa.DataType") -> bool:
        text = types.is_string(kind) or types.is_large_string(kind)
        return text or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)

    if types.is_list(kind) or types.is_large_list(kind):
        return plain(kind.value_type)
    return plain(kind) or (types.is_floating(kind))


def num_rows(config: UrlsConfig) -> int:
    """Rows of the whole list; raises what UrlList raises."""
    return len(UrlList(config))


class UrlListWorker:
    """Writes one shard of the list: `NAME.parquet` with columns key, url, caption and the extra ones.

    A job's arguments are start and stop of its rows and, for a sample of them, step. `files`, from another
    `UrlList`, spare it counting.
    """

    def __init__(self, folder: Folder, config: UrlsConfig, files: Sequence[ListFile] | None = None):
        self.folder, self.list = folder, UrlList(config, files)

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        rows = self.list.rows(wanted)
        rows = rows.add_column(0, "key", pa.array([sample_key(index) for index in wanted], pa.string()))
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow",)) as commit:
            commit.samples = len(rows)
            pq.write_table(rows.combine_chunks(), commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")
