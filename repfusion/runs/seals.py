"""Files of a folder <-> their sizes and sha256, by which whoever reads them knows that they are what was
written.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from repfusion.config import Strict
from repfusion.files import digest_of, file_sha256, flush, write_json

FILES_AT_ONCE = 4
"""Hashing one file takes a core, at 0.5 to 2 GB/s; Python's lock is not held."""


class Seal(Strict):
    """What a file held when it was written."""

    bytes: int
    sha256: str


Seals = Mapping[str, Seal]
"""Seals of files, by path in their folder."""
_SEALS = TypeAdapter(dict[str, Seal])


def files_below(folder: Path) -> list[str]:
    """Paths of all files of a folder, relative to it, in order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Sealing:
    """Brings files of a folder to the disk and describes them, in threads, while others are still written.
    Done by the process that wrote them, which has them in memory still.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._threads = ThreadPoolExecutor(_num_threads(), "sealing")
        self._seals: dict[str, Future[Seal]] = {}
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> "Sealing":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, *paths: Path) -> None:
        """Files below the folder that are written to their end."""
        for path in paths:
            self._flushes.append(self._threads.submit(flush, path))
            self._seals[str(path.relative_to(self.folder))] = self._threads.submit(_seal, path)

    def seals(self) -> dict[str, Seal]:
        """Waits until all that was added is on the disk. Raises OSError where it could not be."""
        for one in self._flushes:
            one.result()
        return {name: one.result() for name, one in self._seals.items()}


def seal(folder: Path, names: Iterable[str]) -> dict[str, Seal]:
    """Brings files to the disk and describes them."""
    with Sealing(folder) as sealing:
        sealing.add(*(folder / name for name in names))
        return sealing.seals()


def write_seals(path: Path, schema: int, info: Mapping[str, Any], seals: Seals) -> None:
    """The JSON that marks a folder complete, with a digest of itself: a list that lost a line is none."""
    files = {name: one.model_dump() for name, one in sorted(seals.items())}
    record = {"schema": schema, **info, "files": files}
    write_json(path, {**record, "digest": digest_of(record)})


def read_seals(path: Path, schema: int, what: str) -> dict[str, Any]:
    """The JSON that marks a folder complete, `files` as seals by name; the files are not looked at.

    Raises:
        ValueError: it is not readable, or of another schema; `what` names the folder.
    """
    try:
        info = json.loads(path.read_bytes())
        if info["schema"] != schema:
            raise ValueError(
                f"{what} has schema {info['schema']}, this code reads {schema}; make it again, or use the "
                "code that wrote it"
            )
        if info.pop("digest") != digest_of(info):
            raise TypeError("its own digest is another")
        info["files"] = _SEALS.validate_python(info["files"])
        if strange := [name for name in info["files"] if Path(name).is_absolute() or ".." in name]:
            raise ValueError(f"{what}: {path.name} names {strange[0]!r}, which is no file of it")
    except (OSError, TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what}: {path.name} is damaged ({reason}); copy it again") from error
    return info


def damage(folder: Path, seals: Seals) -> str | None:
    """What is wrong with the first file that is not what its seal says; None where all are. Sizes are
    compared before any file is read.
    """
    paths = {name: folder / name for name in seals}
    for name, path in paths.items():
        try:
            if not path.is_file():
                return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if (size := path.stat().st_size) != seals[name].bytes:
            return f"{name} is {size} bytes long (truncated?), expected {seals[name].bytes} bytes"
    with ThreadPoolExecutor(_num_threads()) as executor:
        problems = executor.map(_changed, seals, paths.values(), seals.values())
        return next((problem for problem in problems if problem), None)


def _num_threads() -> int:
    return min(FILES_AT_ONCE, os.cpu_count() or 1)


def _seal(path: Path) -> Seal:
    return Seal(bytes=path.stat().st_size, sha256=file_sha256(path))


def _changed(name: str, path: Path, expected: Seal) -> str | None:
    try:
        digest = file_sha256(path)
    except OSError as error:
        return f"{name} cannot be read ({error})"
    if digest == expected.sha256:
        return None
    got = f"{name} has sha256 {digest[:12]}, expected {expected.sha256[:12]}"
    return f"{got}: its content was changed or damaged"
