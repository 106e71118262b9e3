"""Where weights lie: the small foundation shipped with the library, made by `repfusion.foundation`, and the
places of copies of what lies behind URLs (`repfusion.pretrained.cache` fetches them).

CACHE/s3%3A%2F%2Fbucket%2Fmodels/llava/         a copy of s3://bucket/models/llava

CACHE is the environment's REPFUSION_CACHE, else ~/.cache/repfusion.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

WEIGHTS = Path(__file__).parent
CACHE = "REPFUSION_CACHE"
WEIGHTS_MARK = "{weights}"
"""Stands for the folder of shipped weights in a saved configuration, so that it can move to another
machine.
"""


def portable(config: Any, old: str = str(WEIGHTS), new: str = WEIGHTS_MARK) -> Any:
    """The dumped configuration with the folder of shipped weights replaced by a mark (or back)."""
    match config:
        case dict():
            return {key: portable(value, old, new) for key, value in config.items()}
        case str() if config == old or config.startswith(f"{old}/"):
            return new + config[len(old) :]
        case _:
            return config


def cache_root() -> Path:
    """Where the copies lie on this node."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache/repfusion").absolute()


def cached(url: str) -> Path:
    """The place of the copy of a folder behind a URL, the same on all nodes whose caches lie in one place;
    nothing is fetched yet.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    return cache_root() / quote(parent, safe="") / name


def url_of(folder: Path) -> str | None:
    """The URL of which a path is the copy's place; None of any other path."""
    if folder.parent.parent != cache_root() or "%3A%2F%2F" not in folder.parent.name:
        return None
    return f"{unquote(folder.parent.name)}/{folder.name}"
