"""Lists of image addresses and captions, in any format and of any size -> url lists of a shard's size, in
order and with keys.

Every row ends in a list or as a counted drop.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.lists.blocks import BadColumn, Block
from pipelines.lists.captions import ALL_CAPTIONS, SeveralCaptions, lists_remedy, one_text, read_caption
from pipelines.lists.columns import caption_column, json_column, text_column
from pipelines.lists.tables import LIST_ENDINGS, TABLE_ENDINGS, CsvFormat, Table, open_table
from pipelines.lists.values import BadEntry
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, sample_key
from pipelines.sources.base import Entries, download_stage, list_stage, numbered_entries
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.inputs import find_inputs
from pipelines.sources.raw_samples import free_names
from repfusion.config import Config
from repfusion.files import digest_of

if TYPE_CHECKING:
    import pyarrow as pa

RESERVED = {"key", "url", "caption", ALL_CAPTIONS, "width", "height", "original_width", "original_height"}
"""Names that ingest gives to a sample's JSON."""


class UrlsConfig(Config):
    """A list of addresses to download."""

    kind: Literal["urls"] = "urls"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """A .parquet, .csv, .tsv, .jsonl or .json file (the latter four may end in .gz too), a folder of them (of
    .json files none) or a pattern such as `lists/part-*.parquet` or `lists/{000..127}.csv`; local or any
    fsspec URL. Several files are read in the order of their names.
    """
    url_column: str = "url"
    """The list's column of addresses."""
    caption_column: str = "caption"
    """The list's column of captions; an empty or missing one is dropped, and counted, by `curate`."""
    several_captions: SeveralCaptions = "whole"
    """What a caption of several lines, or a list of captions, means: `whole` is one caption, and refuses
    lists; `first` takes the first; `all` takes it too and keeps all as `all_captions` in the sample's JSON,
    for a captions column to draw from.
    """
    extra_columns: Annotated[tuple[str, ...], free_names(RESERVED)] = ()
    """Further columns (text, numbers, truth values, lists and structs of these) that go into each sample's
    JSON, such as alternative captions.
    """
    csv: CsvFormat = CsvFormat()
    """How csv and tsv files are written."""
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
            {"config": config, "files": files, "max_drop_fraction": ingest.max_drop_fraction},
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
    """A file of a list and the numbers of rows of its parts, which can be read by themselves."""

    url: str
    sections: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.sections)


def find_files(config: UrlsConfig) -> list[str]:
    """The list's files, in the order of their names.

    Raises:
        ValueError: where there is none, or one of another kind.
    """
    found = find_inputs(config.path, TABLE_ENDINGS, "source.path", config.options, LIST_ENDINGS)
    return [file.url for file in found]


class UrlList:
    """The rows of a list over all its files, as tables with columns url, caption and the extra ones.

    Making one without `files` reads the footers of parquet files and all of the others; memory stays bounded
    by a block of rows. Reading keeps its position, so that ascending calls read a text file once.

    Raises:
        ValueError: for a list without files, and one that lacks a column or has one of an unfit type.
    """

    def __init__(self, config: UrlsConfig, files: Sequence[ListFile] | None = None):
        self.config = config
        self._opened = ExitStack()
        self._table: tuple[str, Table] | None = None
        if files is None:
            files = [ListFile(url, self._count(url)) for url in find_files(config)]
        self.files = tuple(files)
        self._starts = [0, *accumulate(file.rows for file in files)]
        self._range = range(0)
        """The rows that `_blocks` runs over: a part of a file."""
        self._blocks: Iterator[Block] = iter(())
        self._block: Block | None = None
        self._first = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def _count(self, url: str) -> tuple[int, ...]:
        table = self._open(url)
        return tuple(table.num_rows(section) for section in range(table.num_sections))

    def read(self, wanted: range) -> "tuple[pa.Table, dict[int, BadEntry]]":
        """The rows at ascending positions, and what is wrong with those that are left out; of parquet files,
        only the row groups that hold one are read.
        """
        import pyarrow as pa

        pieces: list[pa.Table] = []
        bad: dict[int, BadEntry] = {}
        done = 0
        while done < len(wanted):
            first, block = self._block_at(wanted[done])
            inside = wanted[done : bisect_left(wanted, first + len(block))]
            piece, left_out = self._named(
                block.take(range(inside[0] - first, inside[-1] - first + 1, wanted.step))
            )
            bad |= {inside[row]: error for row, error in left_out.items()}
            pieces.append(piece)
            done += len(inside)
        try:
            return pa.concat_tables(pieces, promote_options="permissive"), bad
        except pa.ArrowTypeError as error:
            raise ValueError(
                f"source.extra_columns: the files of {self.config.path} disagree about a type: {error}"
            ) from error

    def _block_at(self, position: int) -> tuple[int, Block]:
        """The block of rows that holds a position, and the position of its first row."""
        if position not in self._range or position < self._first:
            self._seek(position)
        while self._block is None or position >= self._first + len(self._block):
            self._first += 0 if self._block is None else len(self._block)
            self._block = next(self._blocks, None)
            if self._block is None:
                raise ValueError(
                    f"source.path: {self.config.path} ends before row {position:,} of {len(self):,}; "
                    "it changed since it was counted: run again"
                )
        return self._first, self._block

    def _seek(self, position: int) -> None:
        index = bisect_right(self._starts, position) - 1
        file = self.files[index]
        edges = list(accumulate(file.sections, initial=self._starts[index]))
        section = bisect_right(edges, position) - 1
        self._range, self._blocks = range(edges[section], edges[section + 1]), iter(())
        self._blocks = self._open(file.url).blocks(section)
        self._first, self._block = self._range.start, None

    def _open(self, url: str) -> Table:
        """A file, kept open until another one is asked for."""
        if self._table is None or self._table[0] != url:
            config = self.config
            needed = [
                text_column(config.url_column, "source.url_column"),
                caption_column(
                    config.caption_column, "source.caption_column", lists_remedy(config.several_captions)
                ),
                *(json_column(name, "source.extra_columns") for name in config.extra_columns),
            ]
            self._opened.close()
            self._table = None
            opened = open_table(url, config.options, needed, f"source.path: {url}", config.csv)
            self._table = (url, self._opened.enter_context(opened))
        return self._table[1]

    def _named(self, block: Block) -> "tuple[pa.Table, dict[int, BadEntry]]":
        """Columns url and caption as text that is never null, and the extra ones; without the rows of which
        a value cannot be had.
        """
        import pyarrow as pa

        columns, bad = self._plain(block), {}
        if columns is None:
            columns, bad = self._checked(block)
        for name in self.config.extra_columns:
            try:
                columns[name], unfit = block.column(name)
            except BadColumn as error:
                raise ValueError(f"source.extra_columns: {self.config.path}: {error}") from error
            bad = unfit | bad
        table = pa.table(columns)
        return (table.filter([row not in bad for row in range(len(table))]) if bad else table), bad

    def _plain(self, block: Block) -> dict[str, Any] | None:
        """Columns url and caption where every text is one as it is: without a look at each."""
        if self.config.several_captions != "whole":
            return None
        names = {"url": self.config.url_column, "caption": self.config.caption_column}
        columns = {name: block.plain_text(column) for name, column in names.items()}
        return None if any(column is None for column in columns.values()) else columns

    def _checked(self, block: Block) -> tuple[dict[str, Any], dict[int, BadEntry]]:
        import pyarrow as pa

        bad: dict[int, BadEntry] = {}
        pairs = zip(block.cells(self.config.url_column), block.cells(self.config.caption_column), strict=True)
        rows = [self._row(row, url, caption, bad) for row, (url, caption) in enumerate(pairs)]
        columns = {
            "url": pa.array([url for url, _, _ in rows], pa.string()),
            "caption": pa.array([caption for _, caption, _ in rows], pa.string()),
        }
        if self.config.several_captions == "all":
            columns[ALL_CAPTIONS] = pa.array([texts for _, _, texts in rows], pa.list_(pa.string()))
        return columns, bad

    def _row(self, row: int, url: Any, caption: Any, bad: dict[int, BadEntry]) -> tuple[str, str, list[str]]:
        """Address, caption and all captions; an address that is no text is none."""
        try:
            text, fields = read_caption(caption, self.config.several_captions)
        except BadEntry as error:
            bad[row] = error
            return "", "", []
        try:
            return one_text(url) or "", text or "", fields.get(ALL_CAPTIONS, [])
        except BadEntry as error:
            bad[row] = BadEntry("invalid_url", f"the address is no text: {error.detail}")
            return "", "", []


def num_rows(config: UrlsConfig) -> int:
    """Rows of the whole list; raises what UrlList raises."""
    return len(UrlList(config))


class UrlListWorker:
    """Writes one shard of the list: `NAME.parquet` with columns key, url, caption and the extra ones.

    A job's arguments are start and stop of its rows and, for a sample of them, step. `files`, from another
    `UrlList`, spare it counting.

    Reasons of drops: invalid_url (no text), undecodable_caption, not_text, undecodable_metadata.
    """

    def __init__(
        self,
        folder: Folder,
        config: UrlsConfig,
        files: Sequence[ListFile] | None = None,
        max_drop_fraction: float = 1.0,
    ):
        self.folder, self.list, self.max_drop_fraction = folder, UrlList(config, files), max_drop_fraction

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        rows, bad = self.list.read(wanted)
        keys = [sample_key(index) for index in wanted if index not in bad]
        rows = rows.add_column(0, "key", pa.array(keys, pa.string()))
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow",)) as commit:
            commit.samples = len(rows)
            for index, error in bad.items():
                commit.drop(sample_key(index), error.reason, f"row {index}: {error.detail}")
            commit.check_drops(self.max_drop_fraction)
            commit.write_drops()
            pq.write_table(rows.combine_chunks(), commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")
