"""sha256 of weights and lists, remembered so that each is read once; configurations as flat fields."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.shards.storage import said_at
from repfusion.config import naming
from repfusion.files import digest_of, file_sha256, write_json
from repfusion.pretrained.cache import fetch

REMEDY = "give one written by save_pretrained, or run 'make foundation'"
CHECKPOINT_REMEDY = "give a checkpoint's: first run the workflow that makes it ('make demo' for ours)"


class Digests:
    """sha256 of weight folders and files, remembered in the root by size and time of change: a 7B model is
    read once.
    """

    def __init__(self, root: Path):
        self._path = root / "digests.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            self._known = {}

    def file(self, path: Path) -> str:
        stat, name = path.stat(), str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self._known.get(name, [None])[:2] != stamp:
            self._known[name] = [*stamp, file_sha256(path)]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
        return self._known[name][2]

    def url(self, url: str, options: Mapping[str, Any]) -> str:
        """sha256 of a local file; of a remote one, what its store says of the version: size and tag, or its
        date.
        """
        if "://" not in url:
            return self.file(Path(url))
        import fsspec

        with said_at(url):
            files, path = fsspec.core.url_to_fs(url, **options)
            info = files.info(path)
        return digest_of(
            [info["size"], str(info.get("ETag") or info.get("LastModified") or info.get("mtime"))]
        )

    def folder(self, path: Path, key: str) -> str:
        """Over the names and bytes of a model folder's files. Raises ValueError, naming the config key,
        where it is missing.
        """
        require_folder(path, key)
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        return digest_of({file.name: self.file(file) for file in files if file.suffix != ".md"})


def require_folder(path: Path, key: str) -> None:
    """Fetches a model's folder that lies behind a URL. Raises ValueError, naming the config key, where it is
    missing.
    """
    with naming(key):
        fetch([path])
    if not path.is_dir():
        remedy = CHECKPOINT_REMEDY if key.endswith("init_from") else REMEDY
        raise ValueError(f"{key}: {path} is no folder; {remedy}")


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested values under dotted names that begin with `prefix`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
