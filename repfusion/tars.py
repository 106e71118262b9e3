"""The one way to read a tar (POSIX ustar and pax, GNU, v7): front to back, every member given or refused.

The rules. A header counts where its checksum is right; a size is octal digits or GNU's base 256. Blocks of
zeros are passed over, so that tars put behind each other by `cat` are one; the last two blocks of a file are
zeros, or it is cut short. Names are UTF-8, other bytes escaped as `\\xe9`; long ones come from pax or GNU
headers. A link is given with the name of the member that it stands for, a sparse member without its holes.
"""

import mmap
import posixpath
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

BLOCK_BYTES = 512
END_BLOCKS = 2
"""How many blocks of zeros end a tar."""
MAX_EXTENDED_BYTES = 1 << 20
"""Size of a pax or GNU header that is still believed."""
SKIP_BYTES = 1 << 20
READ_BYTES = 1 << 24
"""How much is asked for at once: a header may lie about a size, and memory is taken before the file ends."""

Kind = Literal["file", "folder", "link", "sparse", "special"]
KINDS: dict[bytes, Kind] = {
    b"0": "file", b"\0": "file", b"7": "file",
    b"1": "link", b"2": "link", b"5": "folder", b"S": "sparse",
}  # fmt: skip
SYMBOLIC_LINK = b"2"
EXTENDED = (b"x", b"X", b"g", b"L", b"K")
"""Types of headers that speak of the next member: of pax, Solaris and GNU."""
WITHOUT_BYTES = b"123456"
"""Types that are followed by no bytes, whatever size their header names."""


class TarError(ValueError):
    """Bytes that are no tar, or a tar that is damaged from some member on."""


class CutTarError(TarError):
    """A tar that ends before its end mark."""


@runtime_checkable
class ByteSource(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """The next bytes; fewer than asked for at the end alone."""
        ...

    def skip(self, size: int, /) -> int:
        """Passes over bytes; returns how many there were."""
        ...


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    kind: Kind
    offset: int
    """Where its bytes begin."""
    size: int
    target: str = ""
    """Name of the member that a link stands for."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member by WebDataset's rule: the extension follows the first dot of the last
    part of the path. None where there is no dot or the part begins with one: such a file is of no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem and dot else None


class TarReader:
    """Walks through the members of a tar; `data` reads the bytes of the one that was given last.

    Raises:
        CutTarError: where the source ends too early.
        TarError: where it is no tar, or damaged.
    """

    def __init__(self, source: ByteSource):
        self._source = source
        self._position = 0
        self._unread = 0
        """Bytes of the last member that were not asked for yet, filled up to whole blocks."""
        self._size = 0
        self._rest, self._rest_sum = b"", 0

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        zeros = 0
        while True:
            header = self._source.read(BLOCK_BYTES)
            if len(header) < BLOCK_BYTES and (header.strip(b"\0") or zeros < END_BLOCKS):
                raise CutTarError(
                    f"truncated: no end-of-archive mark after {self._position + len(header):,} bytes"
                )
            if not header:
                return
            if header[0] == 0 and not header.strip(b"\0"):
                if extended:
                    raise TarError(f"a header of a long name and no member at byte {self._position:,}")
                zeros += 1
                self._position += len(header)
                continue
            self._check(header, is_after_end=zeros > 0)
            zeros = 0
            self._position += BLOCK_BYTES
            kind, size = header[156:157], _number(header[124:136])
            if kind in EXTENDED:
                extended |= self._extended(kind, size)
                continue
            yield self._member(header, kind, size, extended)
            extended = {}
            self._pass_over()

    def data(self) -> bytes:
        """The bytes of the member that was given last. May be called once."""
        size, padded = self._size, self._unread
        self._unread = self._size = 0
        data = self._read(padded)
        if len(data) < size:
            raise CutTarError(
                f"truncated: {len(data):,} of the {size:,} bytes of a member at byte {self._position:,}"
            )
        self._position += padded
        return data if padded == size else data[:size]

    def _check(self, header: bytes, is_after_end: bool) -> None:
        """Raises TarError for a block that is no header."""
        # what the members of a tar mostly share is summed up once
        rest = header[136:148] + header[156:]
        if rest != self._rest:
            self._rest, self._rest_sum = rest, sum(rest)
        unsigned = sum(header[:136]) + self._rest_sum + 8 * 32
        with suppress(TarError):
            if (expected := _number(header[148:156])) == unsigned:
                return
            # some writers took bytes for signed numbers
            summed = header[:148] + header[156:]
            if expected == unsigned - 256 * sum(byte > 127 for byte in summed):
                return
        if self._position == 0:
            kind = "it is compressed by gzip" if header.startswith(b"\x1f\x8b") else "no header at its start"
            raise TarError(f"not a readable tar: {kind}")
        after = " behind the end-of-archive mark" if is_after_end else ""
        raise TarError(f"no header at byte {self._position:,}{after}")

    def _member(self, header: bytes, kind: bytes, size: int, extended: dict[str, str]) -> Member:
        offset = self._position
        if kind == b"S":
            # GNU's list of the holes goes on in further blocks, before the bytes
            more = header[482]
            while more:
                more = self._block()[504]
                offset = self._position
        name, found, target = _name(header), KINDS.get(kind, "special"), ""
        if extended:
            name = extended.get("GNU.sparse.name") or extended.get("path") or name
            size = _decimal(extended.get("size", str(size)))
            if any(key.startswith("GNU.sparse.") for key in extended):
                found = "sparse"
        if kind == b"\0" and name.endswith("/"):
            found = "folder"  # as v7 says it
        if found == "link":
            target = extended.get("linkpath") or _text(header[157:257])
            folder = posixpath.dirname(name) if kind == SYMBOLIC_LINK else ""
            target = posixpath.normpath(posixpath.join(folder, target))
        self._expect(0 if kind in WITHOUT_BYTES else size)
        return Member(name, found, offset, self._size, target)

    def _expect(self, size: int) -> None:
        self._size, self._unread = size, -(-size // BLOCK_BYTES) * BLOCK_BYTES

    def _pass_over(self) -> None:
        """Goes on to the next header."""
        padded, size = self._unread, self._size
        self._unread = self._size = 0
        if padded:
            if self._source.skip(padded) < size:
                raise CutTarError(
                    f"truncated: not all of the {size:,} bytes of a member at byte {self._position:,}"
                )
            self._position += padded

    def _extended(self, kind: bytes, size: int) -> dict[str, str]:
        """What a pax or GNU header says of the next member. What pax says of all members is not used."""
        if size > MAX_EXTENDED_BYTES:
            raise TarError(f"a header of {size:,} bytes at byte {self._position:,}")
        self._expect(size)
        data = self.data()
        match kind:
            case b"L":
                return {"path": _text(data)}
            case b"K":
                return {"linkpath": _text(data)}
            case b"g":
                return {}
        records = dict(_pax_records(data))
        if "path" in records:
            records["path"] = records["path"].rstrip("/")
        return records

    def _block(self) -> bytes:
        block = self._source.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise CutTarError(f"truncated: a header is cut short at byte {self._position:,}")
        self._position += BLOCK_BYTES
        return block

    def _read(self, size: int) -> bytes:
        if size <= READ_BYTES:
            return self._source.read(size)
        blocks = []
        while size and (block := self._source.read(min(size, READ_BYTES))):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)


def _number(field: bytes) -> int:
    """A number of a header. Raises TarError for anything but octal digits or a positive base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    if digits.isdigit() and not (b"8" in digits or b"9" in digits):
        return int(digits, 8)
    raise TarError(f"{field!r} is no number of a tar's header")


def _decimal(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise TarError(f"{text!r} is no size")
    return int(text)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # GNU's own headers have times where POSIX has the folder of a long path
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """`LENGTH KEY=VALUE\\n`, one behind the other."""
    position = 0
    while position < len(data) and data[position]:
        head = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=").match(data, position)
        end = position + int(head[1]) if head else 0
        if head is None or end > len(data) or end < head.end() + 1 or data[end - 1 : end] != b"\n":
            raise TarError("a pax header that is none")
        yield head[2].decode(errors="backslashreplace"), _text(data[head.end() : end - 1])
        position = end


@runtime_checkable
class Readable(Protocol):
    """A stream of bytes: a file, or what a file system at a URL gives."""

    def read(self, size: int, /) -> bytes: ...


class StreamSource:
    """A tar in a stream, which is read to its end."""

    def __init__(self, stream: Readable):
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(size)

    def skip(self, size: int) -> int:
        passed = 0
        while passed < size and (block := self.read(min(size - passed, SKIP_BYTES))):
            passed += len(block)
        return passed


class MappedSource:
    """A tar on disk, of which only the headers come into memory."""

    def __init__(self, data: mmap.mmap):
        self._data, self._position = data, 0

    def read(self, size: int) -> bytes:
        block = self._data[self._position : self._position + size]
        self._position += len(block)
        return block

    def skip(self, size: int) -> int:
        passed = min(size, len(self._data) - self._position)
        self._position += passed
        return passed


def index_members(source: ByteSource) -> dict[str, tuple[int, int]]:
    """The members of a tar: name -> (offset of its bytes, size). A link is its target's.

    Raises:
        TarError: where it is no tar, cut short or damaged, has two members of one name, or one whose bytes
            cannot be found.
    """
    members: dict[str, tuple[int, int]] = {}
    for member in TarReader(source):
        if member.kind == "folder":
            continue
        if member.name in members:
            raise TarError(f"two members of the name {member.name}")
        if member.kind == "file":
            members[member.name] = (member.offset, member.size)
        elif member.target in members:
            members[member.name] = members[member.target]
        else:
            raise TarError(f"member {member.name} is a {member.kind} and has no bytes of its own")
    return members


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """`index_members` of a tar on disk."""
    if path.stat().st_size == 0:
        raise CutTarError("truncated: the file is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return index_members(MappedSource(data))
