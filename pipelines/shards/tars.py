"""Samples <-> tar shards: written byte for byte as webdataset's TarWriter(mtime=0) does, read with every byte
checked.
"""

import hashlib
import tarfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar

TAR_BUFFER_BYTES = 1 << 14
"""tarfile copies what is left of its buffer at every read: a large one costs more than it saves."""

BLOCK_BYTES = 1 << 20
"""Read at once of what is only counted."""
END_BYTES = 1024
"""A tar ends in two blocks of zeros."""


@contextmanager
def tar_shard(commit: ShardCommit) -> Iterator["TarSamples"]:
    """Opens `NAME.tar` among the staged files of a commit."""
    path = commit.staging / f"{commit.name}.tar"
    with path.open("wb") as stream:
        writer = TarSamples(stream, commit)
        try:
            yield writer
        finally:
            writer.close()


_PLAIN = tarfile.TarInfo("")
_PLAIN.mode, _PLAIN.uname, _PLAIN.gname = 0o444, "bigdata", "bigdata"
_TEMPLATE = _PLAIN.tobuf(tarfile.USTAR_FORMAT)


def _tar_header(name: str, size: int) -> bytes:
    """The 512 bytes that webdataset's TarWriter puts before a member, several times faster than tarfile
    makes them.
    """
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = size, 0o444, "bigdata", "bigdata"
        return info.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_TEMPLATE)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


class TarSamples:
    """Writes samples byte for byte as webdataset's TarWriter(mtime=0) does. Keys must ascend, so that
    columns line up.
    """

    def __init__(self, stream: BinaryIO, commit: ShardCommit):
        self._stream, self._commit = stream, commit
        self._last = ""

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Adds `KEY.ext` for each member. Raises ValueError for a key out of order or given twice."""
        if key <= self._last:
            raise ValueError(f"shard {self._commit.name}: key {key} after {self._last}; keys must ascend")
        self._last = key
        for extension in sorted(members):
            data = members[extension]
            self._stream.write(_tar_header(f"{key}.{extension}", len(data)))
            self._stream.write(data)
            self._stream.write(bytes(-len(data) % 512))
        self._commit.samples += 1

    def close(self) -> None:
        """The end-of-archive mark, filled up to a record of 10,240 bytes."""
        position = self._stream.tell() + END_BYTES
        self._stream.write(bytes(END_BYTES + -position % tarfile.RECORDSIZE))


class _TruncatedError(Exception):
    pass


class _HashingReader:
    """Passes reads on and hashes them, so that a shard is checked in the one pass that reads it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._pushed = b""
        self.tail = b""
        """The last bytes read, up to the length of an end-of-archive mark."""
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        if self._pushed:
            block, self._pushed = self._pushed, b""
            return block
        block = self._stream.read(size)
        self.digest.update(block)
        self.tail = (block if len(block) >= END_BYTES else self.tail + block)[-END_BYTES:]
        return block

    def push_back(self, block: bytes) -> None:
        """The next read gives this again."""
        self._pushed = block

    def drain(self) -> None:
        """Reads to the end."""
        while self.read(BLOCK_BYTES):
            pass


def read_samples(
    folder: Folder, file: str, sidecar: Sidecar | None = None, wanted: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar shard as (key, {extension: bytes}), in order; `wanted` extensions only, if given.

    With a sidecar, size and sha256 are compared too; the latter only when the last sample was read, so commit
    nothing before that.

    Raises:
        ShardError: where the file is missing, cut short or changed.
    """
    place = f"shard {folder / file}"
    name = file.rpartition(".")[0]
    advice = f"run 'verify', which rebuilds it, or remove {name}.json and re-run the stage '{folder.name}'"
    try:
        size = folder.size(file)
    except FileNotFoundError as error:
        raise ShardError(f"{place}: no such file; re-run the stage '{folder.name}'") from error
    if sidecar is not None and size != sidecar.bytes:
        raise ShardError(
            f"{place}: {size:,} bytes, its sidecar says {sidecar.bytes:,} (truncated?); {advice}"
        )
    with folder.open(file) as stream:
        reader = _HashingReader(stream)
        try:
            yield from _group(_members(reader, wanted))
            reader.drain()
        except _TruncatedError:
            reader.drain()
            truncated = True
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ShardError(f"{place}: not readable as a tar ({error}); {advice}") from error
        else:
            # one cut between two members reads like a shorter but healthy tar without this test
            truncated = reader.tail != bytes(END_BYTES)
        if truncated and (sidecar is None or reader.digest.hexdigest() == sidecar.sha256):
            raise ShardError(f"{place}: truncated, no end-of-archive mark after {size:,} bytes; {advice}")
    if sidecar is not None and reader.digest.hexdigest() != sidecar.sha256:
        raise ShardError(
            f"{place}: its bytes changed since it was written (not the sidecar's sha256); {advice}"
        )


def _members(reader: _HashingReader, wanted: Container[str] | None) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, bytes) of each file. Plain headers are parsed here: tarfile takes longer over one
    than a small encoder over the image.
    """
    while True:
        header = reader.read(512)
        if len(header) < 512:
            raise _TruncatedError
        if not header.strip(b"\0"):
            return
        if header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0":
            # long names, folders, links: from here on it is tarfile's
            reader.push_back(header)
            with tarfile.open(fileobj=reader, mode="r|", bufsize=TAR_BUFFER_BYTES) as archive:
                for info in archive:
                    if info.isfile() and (data := archive.extractfile(info)) is not None:
                        key, extension = _split(info.name)
                        if wanted is None or extension in wanted:
                            yield key, extension, data.read()
            return
        if sum(header[:148]) + 8 * 32 + sum(header[156:]) != int(header[148:156].strip(b"\0 ") or b"0", 8):
            raise tarfile.ReadError("a header's checksum does not match")
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)
        data = reader.read(size + -size % 512)
        if len(data) < size:
            raise _TruncatedError
        key, extension = _split(header[:100].rstrip(b"\0").decode())
        if wanted is None or extension in wanted:
            yield key, extension, data[:size]


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the extension starts at the first dot of the last part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _group(members: Iterator[tuple[str, str, bytes]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    current: str | None = None
    sample: dict[str, bytes] = {}
    for key, extension, data in members:
        if key != current:
            if current is not None:
                yield current, sample
            current, sample = key, {}
        sample[extension] = data
    if current is not None:
        yield current, sample
