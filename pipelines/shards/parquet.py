"""Parquet files of a folder -> Arrow tables, read so that no thread of Arrow's holds an object of Python's.

Such a thread, letting go of a Python file while the interpreter ends, aborts the process (status 134). Local
files are therefore Arrow's own, and whatever Python hands over is read by the calling thread alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.shards.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def native_file(path: "str | os.PathLike[str]") -> "pa.NativeFile":
    """A local file as Arrow's own. Raises FileNotFoundError and other OSErrors."""
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path))


@contextmanager
def open_parquet(folder: Folder, name: str, **options: Any) -> "Iterator[pq.ParquetFile]":
    """A parquet file of a folder for the length of the block; `options` are ParquetFile's. Read it with
    `use_threads=False`.

    Raises:
        FileNotFoundError: where there is none.
        pa.ArrowException, OSError: where it is not readable as parquet; see `is_damage`.
    """
    import pyarrow.parquet as pq

    with native_file(folder.path / name) if folder.is_local else folder.open(name) as stream:
        yield pq.ParquetFile(stream, pre_buffer=False, **options)


def read_parquet(folder: Folder, name: str, columns: Sequence[str] | None = None) -> "pa.Table":
    """A whole file, or some of its columns; raises what `open_parquet` raises."""
    with open_parquet(folder, name) as parquet:
        return parquet.read(columns, use_threads=False)


def parse_parquet(data: bytes, columns: Sequence[str] | None = None, **options: Any) -> "pa.Table":
    """A whole file's bytes, or some columns of them; `options` are ParquetFile's. Raises pa.ArrowException or
    OSError where they are no parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, **options)
    return parquet.read(columns, use_threads=False)


def is_damage(error: Exception) -> bool:
    """Whether an error is about a file's content. Arrow has OSErrors for that too, of no further kind or
    number.
    """
    import pyarrow as pa

    if isinstance(error, OSError):
        return type(error) is OSError and error.errno is None
    return isinstance(error, pa.ArrowException | EOFError)
