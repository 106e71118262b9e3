"""Where weights lie: the small foundation shipped with the library, made by `repfusion.foundation`, and the
places of copies of what lies behind URLs (`repfusion.pretrained.cache` fetches them).

CACHE/s3%3A%2F%2Fbucket%2Fmodels/llava/         a copy of s3://bucket/models/llava

CACHE is the environment's REPFUSION_CACHE, else ~/.cache/repfusion.
"""

import os
from pathlib import Path
from urllib.parse import quote, unquote

WEIGHTS = Path(__file__).parent
CACHE = "REPFUSION_CACHE"


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
