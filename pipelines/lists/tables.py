"""Tables that others wrote (parquet, csv and its like, JSON) -> blocks of rows, in order, one in memory.

What cells separate, quote and escape is as RFC 4180 has it. Text is UTF-8, with or without a byte order mark.
Parquet files are read by row group, all others from front to back.
"""

import codecs
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from csv import Error as CsvError
from csv import reader as csv_rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import Field, field_validator

from pipelines.lists.blocks import ArrowBlock, Block, RecordBlock, keys_in_type
from pipelines.lists.columns import Needed, check_columns
from pipelines.shards.parquet import is_damage, native_file, open_parquet
from pipelines.shards.storage import Folder, said_at
from repfusion.config import Config

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TEXT_ENDINGS = (".csv", ".tsv", ".jsonl", ".json")
LIST_ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
"""Names of what a folder of lists holds, in small letters or capitals."""
TABLE_ENDINGS = (*LIST_ENDINGS, ".json", ".json.gz")
"""Names of what can be read. A .json in a folder of lists is more often about them than one of them."""
BATCH_ROWS = 1 << 14
CSV_BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 20
UNREADABLE = (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error, CsvError)
"""What Python raises over the content of a file."""


class CsvFormat(Config):
    """How csv files and their like are written."""

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What separates cells; None is a tab in .tsv files, else a comma."""
    column_names: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the columns of files without a heading; None takes the first line as one."""

    @field_validator("delimiter", mode="before")
    @classmethod
    def _tab_can_be_typed(cls, value: Any) -> Any:
        return "\t" if value == "\\t" else value


class Table(ABC):
    """A file, opened by `open_table`."""

    columns: list[str]
    """Names of all its columns."""

    @property
    def num_sections(self) -> int:
        """How many parts there are that can be read by themselves."""
        return 1

    def num_rows(self, section: int) -> int:
        """Rows of a part; most files have to be read for it."""
        return sum(len(block) for block in self.blocks(section))

    def may_hold(self, section: int, name: str, wanted: Collection[str]) -> bool:
        """Whether a part can have one of some keys in a column, as far as is known without reading it."""
        return True

    @abstractmethod
    def blocks(self, section: int) -> Iterator[Block]:
        """The rows of a part, in order. Raises ValueError where they are damaged."""


@contextmanager
def open_table(
    url: str, options: Mapping[str, Any], needed: Sequence[Needed], place: str, csv: CsvFormat = CsvFormat()
) -> Iterator[Table]:
    """A table's file whose columns are known to fit, read by the ending of its name.

    Args:
        url: a path or a URL.
        options: of the fsspec file system.
        needed: the columns that are read.
        place: where the configuration asks for the file, and the file, as messages begin.
        csv: how it is written, where it is a csv or its like.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: not readable, a column is missing, there twice or of an unfit type.
    """
    names = list(dict.fromkeys(one.name for one in needed))
    parent, slash, name = url.rpartition("/")
    folder = Folder(parent or slash or ".", options)
    with ExitStack() as stack:
        with said_at(place):
            match _ending(name):
                case ".parquet":
                    try:
                        parquet = stack.enter_context(open_parquet(folder, name))
                    # Arrow's errors over a damaged file have no common class
                    except Exception as error:
                        if is_damage(error):
                            raise ValueError(f"{place} is not readable as parquet: {error}") from error
                        raise
                    schema = parquet.schema_arrow
                    table = _ParquetTable(schema.names, parquet, names, place)
                    check_columns(needed, schema.names, place, lambda column: schema.field(column).type)
                case ".csv" | ".tsv" as ending:
                    delimiter = csv.delimiter or ("\t" if ending == ".tsv" else ",")
                    table = _CsvTable([], folder, name, names, place, delimiter, csv.column_names)
                    table.columns.extend(table.header())
                    check_columns(needed, table.columns, place, None, table.advice(needed))
                case _:
                    table = _JsonTable([], folder, name, names, place)
                    table.columns.extend(table.header())
                    check_columns(needed, table.columns, place, None)
        yield table


def _ending(name: str) -> str:
    stem = name.lower().removesuffix(".gz")
    return next((ending for ending in (".parquet", *TEXT_ENDINGS) if stem.endswith(ending)), "")


@dataclass(frozen=True)
class _ParquetTable(Table):
    columns: list[str]
    parquet: "pq.ParquetFile"
    names: list[str]
    place: str

    @property
    def num_sections(self) -> int:
        return self.parquet.num_row_groups

    def num_rows(self, section: int) -> int:
        return self.parquet.metadata.row_group(section).num_rows

    def may_hold(self, section: int, name: str, wanted: Collection[str]) -> bool:
        metadata = self.parquet.metadata
        keys = keys_in_type(wanted, self.parquet.schema_arrow.field(name).type)
        # nested columns count several times, so that places differ from those among the names
        index = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name)
        known = metadata.row_group(section).column(index).statistics
        if not keys or known is None or not known.has_min_max or type(known.min) is not type(keys[0]):
            return bool(keys)
        first = bisect_left(keys, known.min)
        return first < len(keys) and keys[first] <= known.max

    def blocks(self, section: int) -> Iterator[Block]:
        import pyarrow as pa

        try:
            for batch in self.parquet.iter_batches(
                BATCH_ROWS, row_groups=[section], columns=self.names, use_threads=False
            ):
                yield ArrowBlock(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            raise ValueError(f"{self.place} is damaged: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class _TextTable(Table):
    columns: list[str]
    folder: Folder
    name: str
    names: list[str]
    place: str

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file's plain bytes, for Python to read."""
        with self.folder.open(self.name) as stream:
            if not self.name.lower().endswith(".gz"):
                yield stream
                return
            with gzip.open(stream) as plain:
                yield plain  # pyright: ignore[reportReturnType]

    def _not_utf8(self) -> str | None:
        """Where the file stops being UTF-8, for people; None where it is."""
        decoder, read, lines = codecs.getincrementaldecoder("utf-8")(), 0, 0
        with suppress(EOFError, gzip.BadGzipFile, zlib.error), self._open() as stream:
            while block := stream.read(READ_BYTES):
                held = len(decoder.getstate()[0])
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    at = error.start - held
                    byte, line = read + at, lines + 1 + block[: max(0, at)].count(b"\n")
                    return f"byte {byte:,}, in line {line:,}, is no UTF-8; convert the file (iconv -t utf-8)"
                read, lines = read + len(block), lines + block.count(b"\n")
            if decoder.getstate()[0]:
                return "its last character is cut short"
        return None


@dataclass(frozen=True)
class _CsvTable(_TextTable):
    delimiter: str
    column_names: tuple[str, ...] | None

    def advice(self, needed: Sequence[Needed]) -> str:
        """What to do where a column is missing."""
        section = needed[0].key.rpartition(".")[0]
        only = self.columns[0] if len(self.columns) == 1 else ""
        if other := next((mark for mark in ";\t|," if mark in only), ""):
            return f"; are its cells separated by {other!r}? Set {section}.csv.delimiter"
        if self.column_names is None and not {one.name for one in needed} & set(self.columns):
            return f"; if it has no heading, give {section}.csv.column_names"
        return ""

    def header(self) -> list[str]:
        """The names in the first line that is not empty, or those that were given."""
        if self.column_names is not None:
            return list(self.column_names)
        try:
            with self._open() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
                return next((row for row in csv_rows(text, delimiter=self.delimiter) if row), [])
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        # a heading fails to decode in Python, a cell in Arrow
        is_encoding = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
        problem = self._not_utf8() if is_encoding else None
        return ValueError(f"{self.place} is not readable as csv: {problem or error}")

    def blocks(self, section: int) -> Iterator[Block]:
        import pyarrow as pa

        with self._reader() as batches:
            for batch in batches:
                yield ArrowBlock(pa.Table.from_batches([batch]))

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        """Batches of the columns, as text. Raises ValueError where the file is no csv."""
        import pyarrow as pa
        from pyarrow import csv

        header = list(self.column_names) if self.column_names else None
        read = csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=header)
        parse = csv.ParseOptions(newlines_in_values=True, delimiter=self.delimiter)
        # types that are guessed from the first block fail on a later one
        kinds = dict.fromkeys(self.names, pa.string())
        convert = csv.ConvertOptions(include_columns=self.names, column_types=kinds)
        try:
            # a copy of a remote file loses its name once it is open: threads of Arrow's read it meanwhile
            with self.folder.local_copy(self.name) as path:
                native = native_file(path)
            with native:
                is_gzip = self.name.lower().endswith(".gz")
                stream = pa.CompressedInputStream(native, "gzip") if is_gzip else native
                with csv.open_csv(stream, read, parse, convert) as batches:
                    yield batches
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            if isinstance(error, OSError) and not is_damage(error):
                raise
            raise self._unreadable(error) from error


@dataclass(frozen=True)
class _JsonTable(_TextTable):
    """A JSON object a line or, where the first character is [, an array of them, which is read as a whole."""

    def header(self) -> list[str]:
        """The names of the first rows' fields."""
        first = next(self._records(BATCH_ROWS), [])
        return list(dict.fromkeys(name for record in first for name in record))

    def blocks(self, section: int) -> Iterator[Block]:
        for records in self._records(BATCH_ROWS):
            yield RecordBlock([{name: one.get(name) for name in self.names} for one in records])

    def _records(self, number: int) -> Iterator[list[dict[str, Any]]]:
        try:
            with self._open() as stream:
                lines = io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]
                mark = lines.peek(3)[:3] == codecs.BOM_UTF8
                lines.read(3 if mark else 0)
                is_array = lines.peek(1).lstrip()[:1] == b"["
                rows = iter(json.load(lines)) if is_array else self._lines(lines)
                records: list[dict[str, Any]] = []
                for position, row in enumerate(rows, 1):
                    if not isinstance(row, dict):
                        raise ValueError(f"row {position:,} is no object")
                    records.append(row)
                    if len(records) == number:
                        yield records
                        records = []
                if records:
                    yield records
        except UNREADABLE as error:
            problem = self._not_utf8() if isinstance(error, UnicodeDecodeError) else None
            raise ValueError(f"{self.place} is not readable as JSON: {problem or error}") from error

    @staticmethod
    def _lines(lines: io.BufferedReader) -> Iterator[Any]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number:,}: {error}") from error
