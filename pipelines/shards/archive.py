"""A tar that others wrote, compressed by gzip or not, as groups of members with one key.

Members are read by the rules of `repfusion.tars` and grouped by those of webdataset: a key ends at the first
dot, its members lie behind each other, extensions are the same in upper and lower case.
"""

import gzip
import posixpath
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO, Literal

from pipelines.shards.storage import Folder
from repfusion.tars import (
    BLOCK_BYTES,
    CutTarError,
    Member,
    StreamSource,
    TarError,
    TarReader,
    split_name,
)

KeyEnd = Literal["first_dot", "last_dot"]
"""Where in a file's name the key ends and the extension begins."""
GZIP_MAGIC = b"\x1f\x8b"
METADATA_NAME = re.compile(r"__[^/]*__($|/)")
"""What webdataset takes for no sample's."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a member's bytes cannot be had; `reason` is counted, `detail` is for people."""

    reason: str
    detail: str


@dataclass
class Group:
    """Members of one key that lie behind each other in a tar."""

    key: str
    num_bytes: int = 0
    """What they take in the tar."""
    members: dict[str, bytes | Missing | None] = field(default_factory=dict)
    """Bytes by lower-case extension; Missing for what cannot be had, None for what was not asked for."""


class Archive:
    """A tar that others wrote.

    Args:
        folder: where it lies.
        name: of its file.
        key_end: where keys end.
        is_wanted: says of an extension whether its bytes are read.
        max_bytes: what is larger is not read.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        key_end: KeyEnd,
        is_wanted: Callable[[str], bool],
        max_bytes: int,
    ):
        self._folder, self._name, self._key_end = folder, name, key_end
        self._is_wanted, self._max_bytes = is_wanted, max_bytes
        self._stack = ExitStack()
        self._places: dict[str, Member] = {}
        """Files by name: what links stand for."""
        self.strays: list[tuple[str, str]] = []
        """Reason and name of each member that belongs to no sample."""

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self) -> BinaryIO:
        return self._stack.enter_context(self._folder.open(self._name))

    def groups(self) -> Iterator[Group]:
        """Raises TarError where the tar is damaged, behind the last group that is whole; FileNotFoundError
        where it is gone.
        """
        stream = self._open()
        is_compressed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        stream.seek(0)
        source = Unzipped(stream) if is_compressed else StreamSource(stream)
        reader = TarReader(source)
        group: Group | None = None
        for member in reader:
            if member.kind == "folder" or (parts := self._split(member)) is None:
                continue
            key, extension = parts
            if group is None or key != group.key or extension in group.members:
                if group is not None:
                    yield group
                group = Group(key)
            group.num_bytes += BLOCK_BYTES + member.size + -member.size % BLOCK_BYTES
            group.members[extension] = self._found(reader, member, extension, is_compressed)
        if group is not None:
            yield group

    def _split(self, member: Member) -> tuple[str, str] | None:
        """Key and lower-case extension; None for a stray, which is noted."""
        name, folder = member.name, posixpath.dirname(member.name)
        if METADATA_NAME.match(name):
            self.strays.append(("metadata_file", name))
            return None
        if self._key_end == "first_dot":
            parts = split_name(name)
        else:
            stem, extension = posixpath.splitext(posixpath.basename(name))
            parts = (posixpath.join(folder, stem), extension[1:]) if extension[1:] else None
        if parts is None:
            is_hidden = posixpath.basename(name).startswith(".")
            self.strays.append(("hidden_file" if is_hidden else "no_extension", name))
            return None
        return parts[0], parts[1].lower()

    def _found(
        self, reader: TarReader, member: Member, extension: str, is_compressed: bool
    ) -> bytes | Missing | None:
        if member.kind == "file":
            self._places[posixpath.normpath(member.name)] = member
        if not self._is_wanted(extension):
            return None
        if member.kind not in ("file", "link"):
            return Missing("unreadable_member", f"{member.name} is a {member.kind} member")
        held = self._places.get(member.target) if member.kind == "link" else member
        if held is None:
            return Missing("broken_link", f"{member.name} leads to {member.target}, which is not before it")
        if held.size > self._max_bytes:
            return Missing(
                "too_many_bytes", f"{member.name}: {held.size:,} bytes, at most {self._max_bytes:,}"
            )
        if held is member:
            return reader.data()
        if is_compressed:
            return Missing("broken_link", f"{member.name}: links in a compressed tar are not followed")
        stream = self._linked
        stream.seek(held.offset)
        return stream.read(held.size)

    @cached_property
    def _linked(self) -> BinaryIO:
        """The tar a second time, to read what links stand for."""
        return self._open()


class Unzipped(StreamSource):
    """The bytes of a gzip file. Raises TarError where they are damaged."""

    def __init__(self, stream: BinaryIO):
        super().__init__(gzip.GzipFile(fileobj=stream))

    def read(self, size: int) -> bytes:
        try:
            return super().read(size)
        except EOFError as error:
            raise CutTarError("truncated: no end of the gzip stream") from error
        except (OSError, zlib.error) as error:
            raise TarError(f"gzip: {error}") from error
