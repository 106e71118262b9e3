"""What lies behind URLs -> copies on a node's own disk: fetched once a node, whoever of its processes comes
first; the least recently used go where there is no room.

CACHE/s3%3A%2F%2Fbucket%2Fmodels/llava/         a copy of s3://bucket/models/llava
CACHE/s3%3A%2F%2Fbucket%2Fmodels/.llava.json    its files, written last
CACHE/s3%3A%2F%2Fbucket%2Fmodels/.llava.lock    shared by the processes that use it, alone by one that fetches
                                                or removes it; its date says when it was used last

The environment's REPFUSION_CACHE_GIB is what CACHE may hold; without it there is no bound.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from repfusion.files import TEMPORARY, is_store_error, write_json
from repfusion.locks import locked
from repfusion.weights import cache_root, url_of

BOUND = "REPFUSION_CACHE_GIB"
FETCH_SEC = 3600.0
"""How long a process waits for another of its node that fetches what both need."""

_held: dict[Path, IO[str]] = {}
"""Lock files of what this process uses, held until it ends."""


def fetch(folders: Iterable[Path]) -> None:
    """Makes sure that the copies of these folders are here and stay while the process runs; paths that are no
    copies are left alone.

    Raises:
        ValueError: a URL holds nothing, the copies in use leave no room, the store does not answer, or
            another version is in use on this node.
    """
    for folder in folders:
        if (url := url_of(folder)) is not None and folder not in _held:
            _fetch(folder, url)


def hold(folder: Path) -> None:
    """Keeps others from removing a copy while this process runs, and notes that it was used."""
    _hold(folder, lambda: True)


def _hold(folder: Path, is_there: Callable[[], bool]) -> bool:
    """`hold`, unless the copy was removed before it was held; whether it is."""
    if folder not in _held:
        stream = lock_of(folder).open("a")
        fcntl.flock(stream, fcntl.LOCK_SH)
        if not is_there():
            stream.close()
            return False
        _held[folder] = stream
    os.utime(lock_of(folder))
    return True


def lock_of(folder: Path) -> Path:
    """The lock file of a copy."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f".{folder.name}.lock")


def _fetch(folder: Path, url: str) -> None:
    files, there = _listing(url)
    record = folder.with_name(f".{folder.name}.json")
    while _read(record) != there or not _hold(folder, lambda: _read(record) == there):
        # whoever waited for another's download finds it done
        with locked(lock_of(folder), f"end what uses another version of {url}", wait_sec=FETCH_SEC):
            if _read(record) != there:
                record.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                make_room(sum(size for size, _ in there.values()), url)
                _download(files, url, there, folder)
                write_json(record, there)


def _listing(url: str) -> tuple[Any, dict[str, list[Any]]]:
    """The file system, and size and version of each file below a URL, by path."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        found = files.find(root, detail=True)
    except Exception as error:
        # a package for the URL's scheme may be missing
        if not (isinstance(error, OSError | ImportError | ValueError) or is_store_error(error)):
            raise
        raise ValueError(f"{url}: {type(error).__name__}: {error}") from error
    there = {
        path.removeprefix(root).lstrip("/"): [
            info["size"],
            str(info.get("ETag") or info.get("LastModified") or info.get("mtime")),
        ]
        for path, info in sorted(found.items())
        if not path.endswith("/")
    }
    if not there:
        raise ValueError(f"{url}: there is nothing; expected the files of a folder")
    return files, there


def _download(files: Any, url: str, there: dict[str, list[Any]], folder: Path) -> None:
    working = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(working, ignore_errors=True)
    for name, (size, _) in there.items():
        path = working / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{url.rstrip('/')}/{name}", str(path))
        if path.stat().st_size != size:
            raise ValueError(f"{url}/{name}: {path.stat().st_size} bytes came, expected {size}; run again")
    os.replace(working, folder)


def _read(record: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(record.read_bytes())
    return None


def make_room(num_bytes: int, what: str) -> None:
    """Removes copies that no process uses, the least recently used first, until so many bytes fit within the
    bound. Raises ValueError where they do not; `what` names them.
    """
    if not (bound := os.environ.get(BOUND)):
        return
    most = int(float(bound) * 2**30)
    locks = sorted(cache_root().glob("*/.*.lock"), key=lambda path: path.stat().st_mtime_ns)
    held = {path: _bytes_below(_folder_of(path)) for path in locks}
    for path in locks:
        if sum(held.values()) + num_bytes <= most:
            return
        if _remove(path):
            held[path] = 0
    if (used := sum(held.values())) + num_bytes > most:
        raise ValueError(
            f"{what}: its {num_bytes:,} bytes do not fit into {cache_root()}, of whose {most:,} bytes "
            f"processes of this node use {used:,}; raise {BOUND}"
        )


def _folder_of(lock: Path) -> Path:
    return lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))


def _remove(lock: Path) -> bool:
    """Removes a copy that no process uses; whether it did. The lock file stays: others may wait for it."""
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        folder = _folder_of(lock)
        folder.with_name(f".{folder.name}.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
