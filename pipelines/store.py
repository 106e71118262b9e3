"""Shards, sidecars and manifests on disk: written under a temporary name, renamed, and what marks completion
last.

A shard is `NAME.tar` (or `NAME.parquet`) with `NAME.json`, its sidecar, beside it; a stage's folder holds a
`manifest.json` once all of
its shards are complete. The same inputs give the same bytes.
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
"""Raised when a stage's code changes the bytes it writes; part of every fingerprint."""

BLOCK_BYTES = 1 << 20
TAR_BUFFER_BYTES = 1 << 14
"""tarfile copies what is left of its buffer at every read: a large one costs more than it saves."""


class ShardError(ValueError):
    """A shard on disk that is not what its sidecar or the tar format says; the message names it."""


class SideFile(BaseModel):
    """A file that belongs to a shard or a stage: a list of drops, statistics."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Sidecar(BaseModel):
    """What a complete shard holds and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """The shard's name without extension, such as `00042`."""
    file: str
    """Its data file in the stage's folder."""
    fingerprint: str
    """Of the stage that wrote it."""
    inputs: dict[str, str]
    """sha256 of the upstream shards it was made from, by stage."""
    samples: int
    bytes: int
    sha256: str
    drops: dict[str, int]
    """Samples left out, by reason."""
    files: dict[str, SideFile]
    """Further files of the shard, by name."""
    seconds: float
    versions: dict[str, str]


class Manifest(BaseModel):
    """A complete stage: what decided its bytes (`fields`, `upstream`), and its shards."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )

    schema_version: int = Field(alias="schema")
    stage: str
    fingerprint: str
    fields: dict[str, Any]
    """The configuration that decides the bytes, as flat dotted names."""
    upstream: dict[str, str]
    """Fingerprints of the stages it reads."""
    lineage: dict[str, dict[str, Any]]
    """`fields` of every stage above, so that a stale stage can say what changed."""
    shards: list[Sidecar]
    samples: int
    drops: dict[str, int]
    seconds: float
    files: dict[str, SideFile]
    """Files of the stage as a whole, such as `statistics.safetensors`."""
    extra: dict[str, Any]

    @property
    def digest(self) -> str:
        """Names the data: sha256 of the canonical JSON without times and library versions."""
        content = self.model_dump(
            mode="json",
            by_alias=True,
            exclude={"seconds": True, "shards": {"__all__": {"seconds", "versions"}}},
        )
        return digest_of(content)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def side_file(path: Path) -> SideFile:
    return SideFile(bytes=path.stat().st_size, sha256=file_sha256(path))


def sample_key(index: int) -> str:
    """The key of the sample at a position of the source: nine digits, unique over all shards."""
    return f"{index:09d}"


def shard_name(index: int) -> str:
    return f"{index:05d}"


def library_versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages; one that is not installed is left out."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block succeeds and removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # a rename is only as good as the data below it: without the flush a power cut can leave an
        # empty file of the right name
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, keys in the given order, written atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed run left half-written. Only for the holder of the workflow's lock."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmpdir"):
        shutil.rmtree(path)


def read_sidecar(folder: Path, name: str) -> Sidecar | None:
    """The sidecar of a shard, or None where there is none or it is not readable as one."""
    try:
        return Sidecar.model_validate_json((folder / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder, or None where the stage never completed (or an older layout wrote
    it).
    """
    try:
        return Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / "manifest.json", manifest.model_dump(mode="json", by_alias=True))


def missing_files(folder: Path, sidecar: Sidecar) -> list[str]:
    """Which files of a shard are gone or have another size than the sidecar says. Sizes only: `verify`
    reads the bytes.
    """
    sizes = {sidecar.file: sidecar.bytes, **{name: file.bytes for name, file in sidecar.files.items()}}
    wrong = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            wrong.append(name)
    return wrong


class ShardCommit:
    """Collects one shard's output; `commit` puts it in place, its sidecar last. Leaving the block without one
    discards it.

    The block's files live under temporary names, so that a killed worker leaves either the whole shard or
    none of it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        fingerprint: str,
        inputs: dict[str, str],
        packages: tuple[str, ...] = (),
    ):
        self.folder, self.name, self.fingerprint, self.inputs, self.packages = (
            folder,
            name,
            fingerprint,
            inputs,
            packages,
        )
        self.samples = 0
        self.drops: list[tuple[str, str, str]] = []
        self._start = time.perf_counter()
        self._staging: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._staging = tempfile.TemporaryDirectory(
            prefix=f".{self.name}.", suffix=".tmpdir", dir=self.folder
        )
        self.staging = Path(self._staging.name)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._staging is not None
        self._staging.cleanup()

    def drop(self, key: str, reason: str, detail: str = "") -> None:
        """Records a sample that is left out; `reason` is counted, `detail` is for people."""
        self.drops.append((key, reason, detail))

    def check_drops(self, max_fraction: float) -> None:
        """Raises ShardError, with a table of reasons, where more than a share of the samples was dropped."""
        total = self.samples + len(self.drops)
        if len(self.drops) <= max_fraction * total:
            return
        counts = Counter(reason for _, reason, _ in self.drops).most_common()
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
        _, _, detail = self.drops[0]
        raise ShardError(
            f"shard {self.name}: {len(self.drops)} of {total} samples dropped, "
            f"more than max_drop_fraction {max_fraction}: {reasons}; "
            f"the first: {detail}"
        )

    def write_drops(self) -> None:
        """Lists every drop in `NAME.drops.parquet`: key, reason, detail."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(column, pa.string()) for column in zip(*sorted(self.drops), strict=True)]
        table = pa.table(columns or [pa.array([], pa.string())] * 3, names=["key", "reason", "detail"])
        pq.write_table(table, self.staging / f"{self.name}.drops.parquet")

    def commit(self, file: str) -> Sidecar:
        """Moves the staged files into the stage's folder and writes the sidecar; `file` is the one that
        holds the samples.
        """
        staged = sorted(path.name for path in self.staging.iterdir())
        described = {name: side_file(self.staging / name) for name in staged}
        main = described.pop(file)
        sidecar = Sidecar(
            name=self.name,
            file=file,
            fingerprint=self.fingerprint,
            inputs=self.inputs,
            samples=self.samples,
            bytes=main.bytes,
            sha256=main.sha256,
            drops=dict(sorted(Counter(reason for _, reason, _ in self.drops).items())),
            files=described,
            seconds=round(time.perf_counter() - self._start, 3),
            versions=library_versions("repfusion", *self.packages),
        )
        # an old sidecar must not vouch for the new file, were we killed between the two renames
        (self.folder / f"{self.name}.json").unlink(missing_ok=True)
        for name in staged:
            with (self.staging / name).open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(self.staging / name, self.folder / name)
        write_json(self.folder / f"{self.name}.json", sidecar.model_dump(mode="json"))
        return sidecar


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
        position = self._stream.tell() + 1024
        self._stream.write(bytes(1024 + -position % tarfile.RECORDSIZE))


class _HashingReader:
    """Passes reads on and hashes them, so that a shard is checked in the one pass that reads it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._pushed = b""
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        if self._pushed:
            block, self._pushed = self._pushed, b""
            return block
        block = self._stream.read(size)
        self.digest.update(block)
        return block

    def push_back(self, block: bytes) -> None:
        """The next read gives this again."""
        self._pushed = block


def read_samples(
    path: Path, sidecar: Sidecar | None = None, wanted: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar shard as (key, {extension: bytes}), in order; `wanted` extensions only, if given.

    With a sidecar, size and sha256 are compared too; the latter only when the last sample was read, so commit
    nothing before that.

    Raises:
        ShardError: where the file is missing, cut short or changed.
    """
    if not path.is_file():
        raise ShardError(f"shard {path}: no such file; re-run the stage '{path.parent.name}'")
    advice = f"remove {path.with_suffix('.json').name} and re-run the stage '{path.parent.name}'"
    size = path.stat().st_size
    if sidecar is not None and size != sidecar.bytes:
        raise ShardError(
            f"shard {path}: {size:,} bytes, its sidecar says {sidecar.bytes:,} (truncated?); {advice}"
        )
    with path.open("rb") as stream:
        # a tar ends in two zero blocks; one cut between members reads like a shorter but healthy
        # tar without this test
        stream.seek(max(0, size - 1024))
        if size % 512 or stream.read() != bytes(1024):
            raise ShardError(
                f"shard {path}: truncated, no end-of-archive mark after {size:,} bytes; {advice}"
            )
        stream.seek(0)
        reader = _HashingReader(stream)
        try:
            yield from _group(_members(reader, wanted))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ShardError(f"shard {path}: not readable as a tar ({error}); {advice}") from error
        while reader.read(BLOCK_BYTES):
            pass
    if sidecar is not None and reader.digest.hexdigest() != sidecar.sha256:
        raise ShardError(
            f"shard {path}: its bytes changed since it was written (not the sidecar's sha256); {advice}"
        )


def _members(reader: _HashingReader, wanted: Container[str] | None) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, bytes) of each file. Plain headers are parsed here: tarfile takes longer over one than
    a small
    encoder over the image.
    """
    while True:
        header = reader.read(512)
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
            raise tarfile.ReadError("unexpected end of data")
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
