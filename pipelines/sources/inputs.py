"""Paths, folders and patterns, local or at any fsspec URL -> files with what tells that they changed."""

import glob
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.shards.storage import Folder, said_at

STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""Where fsspec's file systems say which version of a file there is; the first one counts."""

LOOK_UPS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that a source reads, as it was when it was listed."""

    name: str
    """Path of the file within the folder that was asked for."""
    url: str
    """Where it lies: a path or a URL."""
    size: int
    stamp: str
    """Time of the last change in nanoseconds, or the store's tag of this version."""

    @property
    def identity(self) -> str:
        """Another one means that the file has to be read again."""
        return f"{self.name}:{self.size}:{self.stamp}"

    def folder(self, options: Mapping[str, Any]) -> Folder:
        return Folder(self.url.rpartition("/")[0], options)

    @property
    def base(self) -> str:
        return self.url.rpartition("/")[2]


def find_inputs(
    path: str,
    endings: tuple[str, ...],
    key: str,
    options: Mapping[str, Any],
    in_folders: tuple[str, ...] | None = None,
) -> tuple[InputFile, ...]:
    """Files at a path, in the order of their names: one file, those directly in a folder that are not hidden,
    or what a pattern finds. In a pattern, `*`, `?` and `[ab]` stand for what is there, `{000..127}` and
    `{a,b}` for names each of which has to lead somewhere. Capitals in a name's ending count as small letters.

    Args:
        path: a path or a URL.
        endings: of the names that may be read.
        key: where the configuration asks for the files.
        options: of the fsspec file system.
        in_folders: endings of what counts in a folder; None is all of `endings`.

    Raises:
        ValueError: where there is none, or one of another ending.
    """
    path = path.removeprefix("file://")
    find = partial(
        _find_local if "://" not in path else _find_remote, endings=in_folders or endings, options=options
    )
    with said_at(f"{key}: {path}"):
        root, found = find(path)
        if not found and "{" in path:
            root, found = _find_each(path, key, find, options)
    wanted = " or ".join(endings)
    if not found:
        raise ValueError(
            f"{key}: {path} leads to no file; expected {wanted} files, a folder of them or a pattern"
        )
    files = []
    for url, size, stamp in found:
        if (shown := url.encode(errors="backslashreplace").decode()) != url:
            raise ValueError(f"{key}: {shown}: the name is no UTF-8; rename the file")
        if not url.lower().endswith(endings):
            raise ValueError(f"{key}: {url}: expected a name that ends in {wanted}")
        files.append(InputFile(url.removeprefix(root).lstrip("/"), url, size, stamp))
    return tuple(sorted(files, key=lambda file: file.name))


Found = tuple[str, list[tuple[str, int, str]]]
"""A folder, and the url, size and stamp of files below it."""


def _find_each(pattern: str, key: str, find: Callable[[str], Found], options: Mapping[str, Any]) -> Found:
    """What each name finds that the braces of a pattern stand for.

    Raises:
        ValueError: where one finds nothing, or the braces do not match.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        paths = list(dict.fromkeys(braceexpand(pattern, escape=False)))
    except UnbalancedBracesError as error:
        raise ValueError(f"{key}: {pattern}: its braces do not match") from error
    if paths == [pattern]:
        return pattern, []
    # each look-up of a store is a round trip
    with ThreadPoolExecutor(LOOK_UPS_AT_ONCE if "://" in pattern else 1) as pool:
        results = list(pool.map(find, paths))
    if missing := [path for path, (_, found) in zip(paths, results, strict=True) if not found]:
        raise ValueError(
            f"{key}: {len(missing):,} of the {len(paths):,} names that {pattern} stands for lead to no file, "
            f"first {missing[0]}"
        )
    every = {file[0]: file for _, found in results for file in found}
    root = _fixed_part(pattern)
    if "://" in pattern:
        import fsspec

        root = _spelled(root, fsspec.filesystem(pattern.partition("://")[0], **options))
    return root, [*every.values()]


def _fixed_part(pattern: str) -> str:
    """The folder in which all that a pattern finds must lie."""
    first = min(at for at in (pattern.find(mark) for mark in "*?[{") if at >= 0)
    return pattern[:first].rpartition("/")[0]


def _find_local(path: str, endings: tuple[str, ...], options: Mapping[str, Any]) -> Found:
    if os.path.isdir(path):
        root, paths = (
            path.rstrip("/"),
            [
                entry.path
                for entry in os.scandir(path)
                if entry.name.lower().endswith(endings) and not entry.name.startswith(".")
            ],
        )
    elif os.path.isfile(path):
        root, paths = os.path.dirname(path), [path]
    elif glob.has_magic(path):
        root, paths = _fixed_part(path), glob.glob(path, recursive=True)
    else:
        return path, []
    found = ((name, os.stat(name)) for name in paths if os.path.isfile(name))
    return root, [(name, status.st_size, str(status.st_mtime_ns)) for name, status in found]


def _find_remote(path: str, endings: tuple[str, ...], options: Mapping[str, Any]) -> Found:
    import fsspec

    scheme = path.partition("://")[0]
    files = fsspec.filesystem(scheme, use_listings_cache=False, **options)
    if files.isfile(path):
        root, entries = path.rpartition("/")[0], [files.info(path)]
    elif glob.has_magic(path):
        root, entries = _fixed_part(path), list(files.glob(path, detail=True).values())
    else:
        root, entries = path.rstrip("/"), files.ls(path, detail=True) if files.isdir(path) else []
        entries = [
            entry
            for entry in entries
            if entry["name"].lower().endswith(endings)
            and not entry["name"].rpartition("/")[2].startswith(".")
        ]
    return _spelled(root, files), [
        (files.unstrip_protocol(entry["name"]), entry["size"], _stamp(entry))
        for entry in entries
        if entry["type"] == "file"
    ]


def _spelled(root: str, files: Any) -> str:
    """A folder's URL as its file system spells it, with or without a slash of its own."""
    return files.unstrip_protocol(files._strip_protocol(root))


def _stamp(entry: Mapping[str, Any]) -> str:
    return next((str(entry[name]) for name in STAMPS if entry.get(name)), "")


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of a folder."""

    name: str
    is_folder: bool
    size: int
    stamp: str
    fault: str = ""
    """Why it cannot be read: `broken_link`, `link_out`, `link_to_folder` or `not_a_file`."""


def list_folder(folder: Folder, root: Folder) -> list[Listed]:
    """Files and folders directly in a folder, in the order of their names; no hidden ones. A link counts as
    the file below `root` that it leads to.

    Raises:
        FileNotFoundError: where there is no such folder.
    """
    if folder.is_local:
        top = os.path.realpath(root.url)
        listed = (entry for entry in os.scandir(Path(folder.url)) if not entry.name.startswith("."))
        entries = [_listed(entry, top) for entry in listed]
    else:
        import fsspec

        with said_at(folder.url):
            files = fsspec.filesystem(
                folder.url.partition("://")[0], use_listings_cache=False, **folder.options
            )
            found = files.ls(folder.url, detail=True)
        entries = [
            Listed(name, entry["type"] == "directory", entry["size"] or 0, _stamp(entry))
            for entry in found
            if (name := entry["name"].rstrip("/").rpartition("/")[2]) and not name.startswith(".")
        ]
    return sorted(entries, key=lambda entry: entry.name)


def _listed(entry: "os.DirEntry[str]", top: str) -> Listed:
    try:
        status = entry.stat()
    except OSError:  # it leads nowhere, or to itself
        return Listed(entry.name, False, 0, "", "broken_link")
    is_folder, fault = stat.S_ISDIR(status.st_mode), ""
    if entry.is_symlink():
        if os.path.commonpath([top, os.path.realpath(entry.path)]) != top:
            fault = "link_out"
        elif is_folder:
            fault = "link_to_folder"  # whose files are met where they lie
    elif not is_folder and not stat.S_ISREG(status.st_mode):
        fault = "not_a_file"
    return Listed(entry.name, is_folder, status.st_size, str(status.st_mtime_ns), fault)
