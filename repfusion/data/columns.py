"""A folder of WebDataset tars -> where each member of each sample lies, and its bytes.

Headers are read once; members are then read by offset.
"""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from repfusion.data.descriptors import SHARDS_OPEN
from repfusion.files import digest_of
from repfusion.tars import BLOCK_BYTES, TarError, index_tar, split_name

MANIFEST = "manifest.json"
SHARDS = "shards.parquet"
TIMES = ("seconds", "shard_seconds")
"""Fields of a manifest that say nothing about the data."""


def rebuild_hint(shard: Path) -> str:
    return f"delete {shard.name} and its sidecar and re-run the '{shard.parent.name}' stage"


def scan_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Members of a shard as name -> (offset of its bytes, size). ValueError where the tar is cut short or
    not a tar.
    """
    try:
        return index_tar(path)
    except TarError as error:
        raise ValueError(f"{path}: {error}; {rebuild_hint(path)}") from error


def shard_names(folder: Path) -> list[str]:
    """File names of a stage folder's shards, in the stage's order: those of its `shards.parquet`, or every
    tar, sorted, where the folder has no manifest. ValueError where there are none.
    """
    if (folder / SHARDS).exists():
        import pyarrow.parquet as pq

        return pq.read_table(folder / SHARDS, columns=["file"])["file"].to_pylist()
    names = [] if (folder / MANIFEST).exists() else sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"{folder}: no shards (*.tar) here; run the stage that writes this folder")
    return names


def manifest_digest(folder: Path) -> str | None:
    """sha256 of a stage's manifest without times: the name of the data. None where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in TIMES}
    return digest_of(content)


Keys = np.ndarray
"""Keys of a shard as UTF-8, dtype S: a byte a letter, where a str takes 50 more."""


class Column:
    """Members of a folder's shards: one for each key and extension.

    An array `KEY.NAME.npy` may be stood for by `KEY.NAME.ref`, which holds the name of another member of its
    shard: that one's bytes are read in its place.

    Args:
        folder: where the shards lie.
        required: extensions that every key has.
        optional: extensions that a key may lack.
        further: says of any other extension whether it is an optional one, once a shard has it.
    """

    def __init__(
        self,
        folder: Path,
        required: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        further: Callable[[str], bool] = lambda extension: False,
    ):
        self.folder, self.required, self._further = folder, required, further
        self.names: list[str] = []
        """File name of each shard."""
        self.keys: list[Keys] = []
        """Keys of each shard, in order; those of the images are shared."""
        self.spans: dict[str, list[np.ndarray]] = {name: [] for name in (*required, *optional)}
        """Where each key's member begins, in blocks of the tar, and its bytes: one array [n, 2] a shard, 8
        bytes a member; block 0 where a key lacks it.
        """
        self._stamps: list[tuple[int, int]] = []
        """Size and time of change of each shard."""
        self._headers: dict[bytes, tuple[tuple[int, ...], np.dtype, int]] = {}

    def open_shard(self, name: str, keys: Keys | None = None) -> Keys:
        """Finds the members of the next shard, in the order of `keys`, which default to the shard's own;
        returns them.

        Raises:
            ValueError: the shard is missing or damaged, lacks a required member, has a key that is not among
                `keys`, or a reference to nothing.
        """
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"shard {path} is missing; re-run the '{self.folder.name}' stage")
        with SHARDS_OPEN.open(f"{self.folder}/{name}") as file:
            stamp = _stamp(file)
            members = scan_tar(path)
            parts = [found for member in members if (found := split_name(member))]
            own = list(dict.fromkeys(key for key, _ in parts))
            keys = np.array([key.encode() for key in own], bytes) if keys is None else keys
            texts = [key.decode() for key in keys.tolist()]
            if extra := set(own) - set(texts):
                raise ValueError(
                    f"shard {path}, key {min(extra)}: not among the {len(keys)} keys of the images; "
                    f"{rebuild_hint(path)}"
                )
            self.names.append(name)
            self.keys.append(keys)
            self._stamps.append(stamp)
            self._add_further(dict.fromkeys(extension for _, extension in parts))
            for extension, spans in self.spans.items():
                spans.append(_packed([self._span(key, extension, members, file) for key in texts]))
        for extension in self.required:
            self.check_present(extension, -1, np.ones(len(keys), bool))
        return keys

    def _add_further(self, extensions: Iterable[str]) -> None:
        """Takes in the optional extensions that the newest shard is the first to have."""
        for extension in extensions:
            if extension not in self.spans and self._further(extension):
                self.spans[extension] = [_packed([(0, 0)] * len(keys)) for keys in self.keys[:-1]]

    def _span(
        self, key: str, extension: str, members: dict[str, tuple[int, int]], file: int
    ) -> tuple[int, int]:
        if (span := members.get(f"{key}.{extension}")) is not None:
            return span
        stem, _, kind = extension.rpartition(".")
        if kind != "npy" or (reference := members.get(f"{key}.{stem}.ref")) is None:
            return (0, 0)
        offset, size = reference
        target = os.pread(file, size, offset).decode(errors="replace")
        if target not in members:
            path = self.path(-1)
            raise ValueError(
                f"shard {path}, key {key}: {key}.{stem}.ref names {target!r}, which the shard lacks; "
                f"{rebuild_hint(path)}"
            )
        return members[target]

    def path(self, shard: int) -> Path:
        return self.folder / self.names[shard]

    def key(self, shard: int, row: int) -> str:
        return self.keys[shard][row].decode()

    def check_present(self, extension: str, shard: int, wanted: np.ndarray) -> None:
        """Raises ValueError, naming the first, where keys that are `wanted` (bool) lack a member."""
        missing = np.flatnonzero(wanted & ~self.has(extension, shard))
        if len(missing):
            key, path = self.key(shard, int(missing[0])), self.path(shard)
            raise ValueError(
                f"shard {path}, key {key}: no member {key}.{extension} "
                f"({len(missing)} of {len(wanted)} keys lack it); {rebuild_hint(path)}"
            )

    def has(self, extension: str, shard: int) -> np.ndarray:
        """Which keys of a shard have a member of that extension; bool."""
        return self.spans[extension][shard][:, 0] > 0

    def read(self, extension: str, shard: int, row: int) -> bytes | None:
        """A member's bytes; None where the key lacks it. ValueError where the disk does not give them, or the
        shard is not the one that was opened.
        """
        block, size = self.spans[extension][shard][row].tolist()
        if block == 0:
            return None
        try:
            with SHARDS_OPEN.open(f"{self.folder}/{self.names[shard]}") as file:
                raw = os.pread(file, size, block * BLOCK_BYTES)
                stamp = _stamp(file)
        except OSError as error:
            raise ValueError(
                f"{self.place(shard, row)}: {extension} cannot be read ({error}); check the disk, then "
                f"{rebuild_hint(self.path(shard))}"
            ) from error
        if len(raw) != size:
            raise ValueError(
                f"{self.place(shard, row)}: {extension} has {len(raw)} of its {size} bytes: the shard was "
                f"cut short since it was opened; {rebuild_hint(self.path(shard))}"
            )
        if stamp != self._stamps[shard]:
            raise ValueError(
                f"{self.place(shard, row)}: it was written again since it was opened; see that nothing "
                "else is at work in this folder, and run the training again: it resumes"
            )
        return raw

    def read_array(self, extension: str, shard: int, row: int) -> np.ndarray:
        """An npy member that is there. ValueError where it is damaged."""
        raw = self.read(extension, shard, row)
        assert raw is not None
        try:
            known = self._plain_header(raw)
            if known is None:
                return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
            shape, dtype, start = known
            return np.frombuffer(raw, dtype, math.prod(shape), start).reshape(shape)
        except ValueError as error:
            raise ValueError(
                f"{self.place(shard, row)}: not a readable npy member ({error}); "
                f"{rebuild_hint(self.path(shard))}"
            ) from error

    def _plain_header(self, raw: bytes) -> tuple[tuple[int, ...], np.dtype, int] | None:
        """Shape, dtype and where the numbers begin, for numbers in C order. Members of a column begin alike,
        so that a header is parsed once.
        """
        start = 10 + int.from_bytes(raw[8:10], "little")
        if (header := raw[:start]) not in self._headers:
            stream = io.BytesIO(raw)
            if np.lib.format.read_magic(stream) != (1, 0):
                return None
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if is_fortran or dtype.hasobject:
                return None
            self._headers[header] = shape, dtype, start
        return self._headers[header]

    def place(self, shard: int, row: int) -> str:
        """A sample as messages name it."""
        return f"shard {self.path(shard)}, key {self.key(shard, row)}"

    def close(self) -> None:
        """Closes the shards' files; a read opens them again."""
        SHARDS_OPEN.close(self.folder)


def _packed(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Offsets and sizes in 4 bytes each, as all members of a tar begin at a block: up to 2 TiB a shard."""
    packed = np.array(spans, np.int64).reshape(-1, 2)
    packed[:, 0] //= BLOCK_BYTES
    return packed.astype(np.uint32 if packed.max(initial=0) < 1 << 32 else np.int64)


def _stamp(file: int) -> tuple[int, int]:
    stat = os.fstat(file)
    return stat.st_size, stat.st_mtime_ns
