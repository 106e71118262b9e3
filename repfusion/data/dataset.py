"""Columns of WebDataset tars -> samples, joined by key: a data set and its configuration.

A column is a folder of tars with the same keys as the images. Members are read by offset, so samples are read
in any order.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from pydantic import Field, model_validator

from repfusion.config import Config
from repfusion.data.columns import Column, rebuild_hint, scan_tar, shard_names
from repfusion.data.order import shares_of

MAIN = "main"
"""The data set that is not in `mix`."""
FEATURES = "features.npy"
CAPTION = "txt"
"""The member that holds the main caption; it lies with the image."""
MAIN_CAPTION_ONLY: Mapping[str, float] = MappingProxyType({CAPTION: 1.0})


def text_member(caption: str) -> str:
    """Where the precomputed features of a caption lie: `txt` -> `text.npy`, `long.txt` -> `long.text.npy`."""
    return f"{caption.removesuffix(CAPTION)}text.npy"


def check_weights(weights: Mapping[str, float], captions: Path | None) -> dict[str, float]:
    """The positive weights, by name.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or a name is no caption's.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"caption_weights: {name!r} has weight {weight}; expected a number that is 0 or more"
            )
        if name != CAPTION and not name.endswith(f".{CAPTION}"):
            raise ValueError(
                f"caption_weights: {name!r} names no caption; expected {CAPTION!r}, the main one, "
                f"or NAME.{CAPTION}"
            )
    positive = {name: weights[name] for name in sorted(weights) if weights[name] > 0}
    if not positive:
        raise ValueError(
            f"caption_weights: {dict(weights)} leaves nothing to draw; give one a positive weight"
        )
    if captions is None and (others := sorted(positive.keys() - {CAPTION})):
        raise ValueError(
            f"caption_weights: {others[0]!r} lies in the captions column, but data.captions names no folder"
        )
    return positive


class DatasetConfig(Config):
    """One data set: the folders of its columns."""

    images: Path
    """Folder of image shards; training reads only the captions from it."""
    features: Path
    """Folder of the features column (the `latents` stage)."""
    text: Path | None = None
    """Folder of precomputed prompt features (the `features` stage); needed where the method feeds on them."""
    captions: Path | None = None
    """Folder of alternative captions (the `captions` stage); read where `caption_weights` names one."""
    caption_weights: dict[str, float] = dict(MAIN_CAPTION_ONLY)
    """How often each caption is drawn: `txt` is the main one, `NAME.txt` one of the captions column. For a
    sample that lacks some, the weights of those it has count in proportion.
    """
    weight: float = 1.0
    """How often this data set is drawn, relative to the others; at least 1/1024 of the sum."""

    @model_validator(mode="after")
    def _weights_hold(self) -> "DatasetConfig":
        check_weights(self.caption_weights, self.captions)
        return self

    @property
    def columns(self) -> dict[str, Path]:
        """The folders that training reads, by column."""
        found = {name: getattr(self, name) for name in ("images", "features", "text", "captions")}
        return {name: folder for name, folder in found.items() if folder is not None}


class DataConfig(DatasetConfig):
    """What a training reads: one data set, `main`, and those mixed into it."""

    mix: dict[str, DatasetConfig] = {}
    """Further data sets, by a name of your choice; the one above is `main`. Their features have to be those
    of the same encoder. Latents are normalised by the statistics of `main`.
    """
    cache_bytes: int = Field(default=2**30, ge=0)
    """Decoded samples kept in memory on each rank, up to this many bytes, shared by the data sets in
    proportion to their weights; 0 reads every sample from its tar each time.
    """
    prefetch_steps: int = Field(default=2, ge=1)
    """Steps read ahead by a thread, so that the loop does not wait for the disk."""

    @model_validator(mode="after")
    def _mix_holds(self) -> "DataConfig":
        for name in self.mix:
            if name == MAIN or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"mix: {name!r} cannot name a data set; expected letters, digits, '_' and '-', and not "
                    f"{MAIN!r}, which is the one outside the mix"
                )
        shares_of({name: config.weight for name, config in self.datasets.items()})
        return self

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        """All of them by name, `main` first."""
        return {MAIN: self, **{name: self.mix[name] for name in sorted(self.mix)}}


@dataclass(frozen=True)
class Sample:
    key: str
    captions: dict[str, tuple[str, ...]]
    """Under each name that has a weight: the caption, or several that say the same."""
    features: np.ndarray
    """[n, d] float16."""
    text: dict[str, np.ndarray] | None
    """[m, d] precomputed prompt features of each caption, unpadded."""


class ColumnDataset:
    """Random access to samples whose captions, features and (optionally) text features lie in separate tars.

    Opening it reads every tar header and checks that all columns hold the same keys, that every sample has a
    caption that may be drawn, and that features have one shape and dtype.

    Raises:
        ValueError: a tar is truncated, a key is missing or extra in a column, or a shape or dtype differs;
            the message names the shard, the key and what to run.
    """

    def __init__(
        self,
        images: Path,
        features: Path,
        text: Path | None = None,
        cache_bytes: int = 0,
        captions: Path | None = None,
        caption_weights: Mapping[str, float] = MAIN_CAPTION_ONLY,
    ):
        self.weights = check_weights(caption_weights, captions)
        others = tuple(name for name in self.weights if name != CAPTION)
        self.images = Column(images, (CAPTION,), ("json",))
        self.features = Column(features, (FEATURES,))
        self.captions = None if captions is None or not others else Column(captions, (), others)
        self.text = None if text is None else Column(text, (), tuple(map(text_member, self.weights)))
        self.names = shard_names(images)
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.cache: dict[int, Sample] = {}
        for name in self.names:
            self._open_shard(name)
        self.keys = self.images.keys
        self.starts = np.cumsum([0] + [len(keys) for keys in self.keys])
        if len(self) == 0:
            raise ValueError(f"{images}: the shards hold no samples")
        self._check_captions()
        self.shape, self.dtype = (first := self._features(0, 0)).shape, first.dtype
        self._check_shards()

    @classmethod
    def open(cls, config: DatasetConfig, cache_bytes: int = 0) -> "ColumnDataset":
        columns = config.images, config.features, config.text
        return cls(*columns, cache_bytes, config.captions, config.caption_weights)

    def _columns(self) -> Iterator[Column]:
        yield from (column for column in (self.images, self.features, self.captions, self.text) if column)

    def _open_shard(self, name: str) -> None:
        keys: list[str] | None = None
        for column in self._columns():
            keys = column.open_shard(name, keys)

    def _caption_column(self, name: str) -> Column:
        column = self.images if name == CAPTION else self.captions
        assert column is not None
        return column

    def _check_captions(self) -> None:
        """Every caption with a weight occurs, every sample has one of them, each with its text features where
        these are wanted.
        """
        seen = dict.fromkeys(self.weights, 0)
        for shard, keys in enumerate(self.keys):
            drawable = np.zeros(len(keys), bool)
            for name in self.weights:
                present = self._caption_column(name).has(name, shard)
                seen[name] += int(present.sum())
                drawable |= present
                if self.text is not None:
                    self.text.check_present(text_member(name), shard, present)
            if not drawable.all():
                path = self._caption_column(next(iter(self.weights))).paths[shard]
                raise ValueError(
                    f"shard {path}, key {keys[int(drawable.argmin())]}: none of the captions "
                    f"{', '.join(self.weights)} ({(~drawable).sum()} of {len(keys)} keys); "
                    f"give {CAPTION!r}, which every sample has, a weight in caption_weights"
                )
        if absent := [name for name, count in seen.items() if count == 0]:
            folder = self._caption_column(absent[0]).folder
            raise ValueError(
                f"caption_weights: no sample of {folder} has a member {absent[0]!r}; "
                f"it has {self._known_captions()}"
            )

    def _known_captions(self) -> list[str]:
        """Names of the captions in the column's first shard that has any."""
        assert self.captions is not None
        for name in self.names:
            names = {member.partition(".")[2] for member in scan_tar(self.captions.folder / name)}
            if captions := sorted(name for name in names if name.endswith(f".{CAPTION}")):
                return captions
        return []

    def _check_shards(self) -> None:
        """Every shard's first array has the shape of the first; equal member sizes then hold for the rest
        of the shard.
        """
        for shard, keys in enumerate(self.keys):
            if not keys:
                continue
            self._check_shape(self._features(shard, 0), shard, keys[0])
            sizes = self.features.spans[FEATURES][shard][:, 1]
            odd = np.flatnonzero(sizes != sizes[0])
            if len(odd):
                self._check_shape(self._features(shard, int(odd[0])), shard, keys[odd[0]])

    def _check_shape(self, array: np.ndarray, shard: int, key: str) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            path = self.features.paths[shard]
            raise ValueError(
                f"shard {path}, key {key}: features are {array.shape} {array.dtype}, "
                f"expected {self.shape} {self.dtype}; {rebuild_hint(path)}"
            )

    def _features(self, shard: int, row: int) -> np.ndarray:
        return self.features.read_array(FEATURES, shard, row)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        cached = self.cache.get(index)
        if cached is not None:
            return cached
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[shard])
        key = self.keys[shard][row]
        features = self._features(shard, row)
        self._check_shape(features, shard, key)
        captions = self._captions(shard, row)
        text = None
        if self.text is not None:
            text = {name: self.text.read_array(text_member(name), shard, row) for name in captions}
        sample = Sample(key, captions, features, text)
        num_bytes = features.nbytes + sum(len(text) for texts in captions.values() for text in texts)
        num_bytes += sum(array.nbytes for array in (text or {}).values())
        if self.cached_bytes + num_bytes <= self.cache_bytes:
            self.cache[index] = sample
            self.cached_bytes += num_bytes
        return sample

    def _captions(self, shard: int, row: int) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        raw = self.images.read("json", shard, row)
        try:
            for name in self.weights:
                caption = self._caption_column(name).read(name, shard, row)
                if caption is not None:
                    found[name] = (caption.decode().strip(),)
            variants = json.loads(raw).get("captions") if CAPTION in found and raw else None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.images.place(shard, row)}: a caption or its json is not readable text ({error}); "
                "correct it in the source"
            ) from error
        if variants:
            if not (isinstance(variants, list) and all(isinstance(text, str) for text in variants)):
                raise ValueError(
                    f"{self.images.place(shard, row)}: the json's 'captions' are {str(variants)[:60]!r}, "
                    "expected a list of texts that say what the caption says; rename the field in the source"
                )
            found[CAPTION] = tuple(variants)
        return found

    @cached_property
    def text_width(self) -> int | None:
        return None if (text := self[0].text) is None else next(iter(text.values())).shape[-1]

    @property
    def folders(self) -> dict[str, Path]:
        """Of the columns that are read."""
        columns = {
            "images": self.images,
            "features": self.features,
            "text": self.text,
            "captions": self.captions,
        }
        return {name: column.folder for name, column in columns.items() if column is not None}

    def close(self) -> None:
        for column in self._columns():
            column.close()
