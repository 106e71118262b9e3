"""A folder on local disk or behind any fsspec URL, where a file appears whole under its name or not at all.

On local disk a file is written under a temporary name and renamed; elsewhere (S3 and its like have no rename)
it is put in one piece. Nothing here relies on listing being ordered or on folders existing.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from repfusion.files import TEMPORARY, atomic_path, create_file, flush, is_store_error

READ_AT_ONCE = 1000
"""Files in flight, where many are read over a network."""


@dataclass(frozen=True)
class Folder:
    """A place for files.

    `url` is a path or `scheme://...`; `options` go to the fsspec file system (an endpoint, a profile;
    credentials belong into the environment). Pickles, so that actors get it as it is.

    Raises:
        ValueError: for a URL with *, ? or [, which fsspec would take for a pattern, also when it removes.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        if not self.is_local and (found := set(self.url) & set("*?[")):
            raise ValueError(
                f"{self.url}: a URL of a folder may not hold {' or '.join(sorted(found))}; name another one"
            )

    @classmethod
    def at(cls, place: "str | os.PathLike[str] | Folder") -> "Folder":
        """A Folder of a path, of a URL, or of what is one already; `file://` becomes a path."""
        if isinstance(place, Folder):
            return place
        return cls(os.fspath(place).removeprefix("file://"))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url.rstrip('/')}/{name}", self.options)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        return Folder(self.url.rstrip("/").rpartition("/")[0], self.options)

    @property
    def identity(self) -> str:
        """The place's one spelling, however a workflow spells it: links followed, no slash at the end."""
        return str(self.path.resolve()) if self.is_local else self.url.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def path(self) -> Path:
        """The local path. Raises ValueError for a URL, which has none."""
        if not self.is_local:
            raise ValueError(f"{self.url} is not on local disk")
        return Path(self.url)

    @cached_property
    def _files(self) -> Any:
        import fsspec

        # a listing that was kept from before would hide what other processes wrote
        return fsspec.filesystem(self.url.partition("://")[0], use_listings_cache=False, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": dict(self.options)}

    def _at(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int]:
        """Names of the files that lie directly in the folder -> their bytes; nothing half-written, no
        folders. Empty where there is no folder.
        """
        if self.is_local:
            from pyarrow import fs

            # asks for sizes without holding Python's lock, so that several folders are listed at a time
            listed = fs.LocalFileSystem().get_file_info(fs.FileSelector(self.url, allow_not_found=True))
            files = ((info.base_name, info.size) for info in listed if info.is_file)
        else:
            files = ((name, entry["size"]) for name, entry in self._listed("file"))
        return {name: size for name, size in files if not name.endswith(TEMPORARY)}

    def names(self) -> set[str]:
        """The names of `sizes` alone: on local disk several times faster."""
        if not self.is_local:
            return set(self.sizes())
        with suppress(FileNotFoundError), os.scandir(self.url) as entries:
            return {entry.name for entry in entries if not entry.name.endswith(TEMPORARY) and entry.is_file()}
        return set()

    def folders(self) -> set[str]:
        """Names of the folders that lie directly in this one."""
        if self.is_local:
            try:
                return {path.name for path in self.path.iterdir() if path.is_dir()}
            except FileNotFoundError:
                return set()
        return {name for name, _ in self._listed("directory")}

    def _listed(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and entries of a remote folder. S3 consoles make an empty object `x/` for a folder x: it
        lists itself, as a file within itself.
        """
        own = self._files._strip_protocol(self.url).rstrip("/")
        with suppress(FileNotFoundError):
            for entry in self._files.ls(self.url, detail=True):
                path = entry["name"].rstrip("/")
                if entry["type"] == kind and path != own:
                    yield path.rpartition("/")[2], entry

    def has(self, name: str) -> bool:
        return (self.path / name).is_file() if self.is_local else self._files.isfile(self._at(name))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return (self.path / name).stat().st_size if self.is_local else self._files.size(self._at(name))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return (self.path / name).read_bytes() if self.is_local else self._files.cat_file(self._at(name))

    def read_many(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The files of these names that are there, many at a time where each takes a round trip."""
        if self.is_local:
            for name in names:
                with suppress(FileNotFoundError):
                    yield name, self.read(name)
            return
        for start in range(0, len(names), READ_AT_ONCE):
            paths = [self._at(name) for name in names[start : start + READ_AT_ONCE]]
            for path, data in self._files.cat(paths, on_error="omit").items():
                yield path.rpartition("/")[2], data

    def open(self, name: str) -> BinaryIO:
        """A file for reading from front to back, seekable. Raises FileNotFoundError."""
        if self.is_local:
            return (self.path / name).open("rb")
        return cast(BinaryIO, self._files.open(self._at(name), "rb"))

    def write(self, name: str, data: bytes) -> None:
        """A whole file, replacing one of that name."""
        if not self.is_local:
            self._files.pipe_file(self._at(name), data)
            return
        with atomic_path(self.path / name) as temporary:
            temporary.write_bytes(data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file unless there is one of that name; whether it did. On local disk, S3 and some
        others only one of several writers does, elsewhere several may.
        """
        if self.is_local:
            return create_file(self.path / name, data)
        try:
            self._files.pipe_file(self._at(name), data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or "PreconditionFailed" in str(error) or self.has(name):
                return False
            raise
        return True

    def put(self, name: str, source: Path) -> None:
        """Moves a local file, made in `staging`, here."""
        if not self.is_local:
            self._files.put_file(str(source), self._at(name))
            source.unlink()
            return
        flush(source)
        os.replace(source, self.path / name)

    def remove(self, *names: str) -> None:
        """Removes files; those that are not there are no error."""
        for name in names:
            if self.is_local:
                (self.path / name).unlink(missing_ok=True)
            elif self._files.isfile(self._at(name)):
                self._files.rm_file(self._at(name))

    def move(self, name: str, target: "Folder") -> None:
        """Moves a file into another folder of the same store (by a copy where there is no rename)."""
        if self.is_local:
            target.path.mkdir(parents=True, exist_ok=True)
            os.replace(self.path / name, target.path / name)
        else:
            self._files.copy(self._at(name), target._at(name))
            self._files.rm_file(self._at(name))

    def clear(self) -> list[str]:
        """Removes the folder and all in it; returns what could not be removed, and why."""
        problems: list[str] = []
        if self.is_local:
            shutil.rmtree(self.path, onerror=lambda _, path, info: problems.append(f"{path}: {info[1]}"))
        elif self._files.exists(self.url):
            self._files.rm(self.url, recursive=True)
        return problems

    @contextmanager
    def staging(self, label: str) -> Iterator[Path]:
        """A local folder for files that `put` will move here; gone at the end of the block. On local disk it
        lies within this one, so that moving is renaming.
        """
        if self.is_local:
            self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{label}.", suffix=TEMPORARY, dir=self.path if self.is_local else None
        ) as name:
            yield Path(name)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file as a local path for the length of the block. Raises FileNotFoundError."""
        if self.is_local:
            path = self.path / name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            yield path
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            self._files.get_file(self._at(name), str(path))
            yield path

    def remove_temporaries(self) -> None:
        """Removes what a killed run left half-written. Only for the holder of the workflow's lock."""
        if not self.is_local:
            return
        for path in self.path.glob(f".*{TEMPORARY}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def said_at(place: str) -> Iterator[None]:
    """Puts the place of the configuration that asks for a store before what its client raises, as a
    ValueError. Files that are not there go through as they are.
    """
    try:
        yield
    # the clients of stores have no common class of errors; all others go through as they are
    except Exception as error:
        is_answer = isinstance(error, OSError | ImportError) and not isinstance(error, FileNotFoundError)
        if not (is_answer or is_store_error(error)):
            raise
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
