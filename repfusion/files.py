"""Files written whole or not at all, their sha256, and JSON whose bytes are always the same."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE_CLIENTS = {"botocore", "aiohttp", "gcsfs", "azure"}
"""Packages that talk to stores, and raise exceptions of their own."""
TEMPORARY = ".tmp"
"""Ends the names of files and folders that are being written."""
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
"""Numbers of an OSError by which file systems say that they have no hard links."""


@contextmanager
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary name beside a local `path`, flushed and renamed to it when the block succeeds, removed when
    it fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_file(path: Path, data: bytes) -> bool:
    """Writes a small file, whole, unless there is one of that name; whether it did. Of several processes one
    does, also over NFS. Where a file system has no hard links, a reader may see it before it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        try:
            temporary.chmod(0o644)
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with path.open("xb") as stream:
                stream.write(data)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def flush(path: Path) -> None:
    """Brings a file's bytes, or a folder's list of names, to the disk. A rename is only as good as the data
    below it: unflushed, a power cut can leave an empty file of the right name.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(working: Path, folder: Path) -> None:
    """Gives a working folder, whose files were flushed, the name `folder`; an earlier one goes in one move.
    After a power cut there is the whole folder of that name, or the one before, or none.
    """
    for path in (*(one for one in working.rglob("*") if one.is_dir()), working):
        flush(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, old)
    os.replace(working, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """The file at a local path holds the old text or the new one, never a part."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, keys in the given order, written atomically to a local path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON, keys in the given order. Raises ValueError for NaN and infinities."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def bytes_sha256(data: bytes) -> str:
    """sha256 of bytes in memory, hex."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(folder: str | Path) -> str:
    """sha256 over the names and bytes of a folder's safetensors files, hex.

    Raises:
        ValueError: where the folder holds none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder}: no *.safetensors files; expected a Hugging Face model folder (save_pretrained)"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def is_store_error(error: BaseException) -> bool:
    """Whether a remote store's client raised it, for want of credentials or of an answer. There is no common
    base class.
    """
    return any(one.__module__.partition(".")[0] in STORE_CLIENTS for one in type(error).__mro__)
