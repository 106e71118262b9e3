"""Samples <-> tar shards: written byte for byte as webdataset's TarWriter(mtime=0) does, read with every byte
checked.
"""

import hashlib
import tarfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, SideFile
from repfusion.tars import CutTarError, StreamSource, TarError, TarReader, split_name

Part = bytes | memoryview
"""Bytes of a member, or of a part of it; a view counts single bytes."""
BLOCK_BYTES = 1 << 20
"""Read at once of what is only hashed."""
END_BYTES = 1024
"""A tar ends in two blocks of zeros."""
RECORD_BYTES = tarfile.RECORDSIZE
"""What the size of a tar is a multiple of."""


@contextmanager
def tar_shard(commit: ShardCommit) -> Iterator["TarSamples"]:
    """Opens `NAME.tar` among the staged files of a commit."""
    file = f"{commit.name}.tar"
    with (commit.staging / file).open("wb") as stream:
        hashing = HashingWriter(stream)
        writer = TarSamples(hashing, commit)
        try:
            yield writer
        finally:
            writer.close()
    commit.known[file] = hashing.side_file


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


class HashingWriter:
    """Passes writes on and hashes them, so that what was written need not be read again."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._digest, self._bytes = stream, hashlib.sha256(), 0

    def write(self, data: Part) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def tell(self) -> int:
        return self._bytes

    @property
    def side_file(self) -> SideFile:
        """Size and sha256 of what was written."""
        return SideFile(bytes=self._bytes, sha256=self._digest.hexdigest())


class TarSamples:
    """Writes samples byte for byte as webdataset's TarWriter(mtime=0) does. Keys must ascend, so that
    columns line up.
    """

    def __init__(self, stream: "BinaryIO | HashingWriter", commit: ShardCommit):
        self._stream, self._commit = stream, commit
        self._last = ""

    def write(self, key: str, members: Mapping[str, bytes | tuple[Part, ...]]) -> None:
        """Adds `KEY.ext` for each member, which may come in parts. Raises ValueError for a key out of order
        or given twice.
        """
        if key <= self._last:
            raise ValueError(f"shard {self._commit.name}: key {key} after {self._last}; keys must ascend")
        self._last = key
        for extension in sorted(members):
            data = members[extension]
            parts = data if isinstance(data, tuple) else (data,)
            size = sum(map(len, parts))
            self._stream.write(_tar_header(f"{key}.{extension}", size))
            for part in parts:
                self._stream.write(part)
            self._stream.write(bytes(-size % 512))
        self._commit.samples += 1

    def close(self) -> None:
        """The end-of-archive mark, filled up to a record of 10,240 bytes."""
        position = self._stream.tell() + END_BYTES
        self._stream.write(bytes(END_BYTES + -position % RECORD_BYTES))


class HashingReader(StreamSource):
    """Passes reads on and hashes them, so that a shard is checked in the one pass that reads it."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        block = super().read(size)
        self.digest.update(block)
        return block


def read_samples(
    folder: Folder, file: str, sidecar: Sidecar | None = None, wanted: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar shard of ours as (key, {extension: bytes}), in order; `wanted` extensions only, if
    given.

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
        source = HashingReader(stream)
        try:
            yield from _group(TarReader(source), wanted)
        except TarError as error:
            while source.skip(BLOCK_BYTES):
                pass
            if sidecar is None or source.digest.hexdigest() == sidecar.sha256:
                is_cut = isinstance(error, CutTarError)
                fault = f"{error} of {size:,}" if is_cut else f"not readable as a tar ({error})"
                raise ShardError(f"{place}: {fault}; {advice}") from error
    if sidecar is not None and source.digest.hexdigest() != sidecar.sha256:
        raise ShardError(
            f"{place}: its bytes changed since it was written (not the sidecar's sha256); {advice}"
        )


def _group(reader: TarReader, wanted: Container[str] | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    current: str | None = None
    sample: dict[str, bytes] = {}
    for member in reader:
        if member.kind != "file" or (parts := split_name(member.name)) is None:
            continue
        key, extension = parts
        if key != current:
            if current is not None:
                yield current, sample
            current, sample = key, {}
        if wanted is None or extension in wanted:
            sample[extension] = reader.data()
    if current is not None:
        yield current, sample
