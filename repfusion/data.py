"""Columns of WebDataset tars -> batches of features and captions, in an order that a seed and a position
decide.

A column is a folder of tars with the same keys as the images. Members are read by offset, so the shuffle is
exact over the whole data set and resuming is one integer.
"""

import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from repfusion.columns import Column, rebuild_hint, scan_tar, shard_names

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


class DataConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

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
    cache_bytes: int = 2**30
    """Decoded samples kept in memory on each rank, up to this many bytes; 0 reads every sample from its
    tar each time.
    """
    prefetch_steps: int = 2
    """Steps read ahead by a thread, so that the loop does not wait for the disk."""

    @model_validator(mode="after")
    def _weights_hold(self) -> "DataConfig":
        check_weights(self.caption_weights, self.captions)
        return self


@dataclass(frozen=True)
class Sample:
    key: str
    captions: dict[str, tuple[str, ...]]
    """Under each name that has a weight: the caption, or several that say the same."""
    features: np.ndarray
    """[n, d] float16."""
    text: dict[str, np.ndarray] | None
    """[m, d] precomputed prompt features of each caption, unpadded."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `positions` are global sample positions: they decide order, caption and noise."""

    positions: list[int]
    keys: list[str]
    captions: list[str]
    features: Tensor
    """[b, n, d] float16."""
    text: list[Tensor] | None


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
        self.keys: list[list[str]] = []
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.cache: dict[int, Sample] = {}
        for name in self.names:
            self._open_shard(name)
        self.starts = np.cumsum([0] + [len(keys) for keys in self.keys])
        if len(self) == 0:
            raise ValueError(f"{images}: the shards hold no samples")
        self._check_captions()
        self.shape, self.dtype = (first := self._features(0, 0)).shape, first.dtype
        self._check_shards()

    @classmethod
    def open(cls, config: DataConfig) -> "ColumnDataset":
        return cls(
            config.images,
            config.features,
            config.text,
            config.cache_bytes,
            config.captions,
            config.caption_weights,
        )

    def _columns(self) -> Iterator[Column]:
        yield from (column for column in (self.images, self.features, self.captions, self.text) if column)

    def _open_shard(self, name: str) -> None:
        keys: list[str] | None = None
        for column in self._columns():
            keys = column.open_shard(name, keys)
        assert keys is not None
        self.keys.append(keys)

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
                    self.text.check_present(text_member(name), shard, keys, present)
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
        return self.features.read_array(FEATURES, shard, row, self.keys[shard][row])

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
            text = {name: self.text.read_array(text_member(name), shard, row, key) for name in captions}
        sample = Sample(key, captions, features, text)
        num_bytes = features.nbytes + sum(len(text) for texts in captions.values() for text in texts)
        num_bytes += sum(array.nbytes for array in (text or {}).values())
        if self.cached_bytes + num_bytes <= self.cache_bytes:
            self.cache[index] = sample
            self.cached_bytes += num_bytes
        return sample

    def _captions(self, shard: int, row: int) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name in self.weights:
            raw = self._caption_column(name).read(name, shard, row)
            if raw is not None:
                found[name] = (raw.decode().strip(),)
        raw = self.images.read("json", shard, row)
        if CAPTION in found and raw and (variants := json.loads(raw).get("captions")):
            if not (isinstance(variants, list) and all(isinstance(text, str) for text in variants)):
                place = f"shard {self.images.paths[shard]}, key {self.keys[shard][row]}"
                raise ValueError(
                    f"{place}: the json's 'captions' are {str(variants)[:60]!r}, expected a list of texts "
                    "that say what the caption says; rename the field in the source"
                )
            found[CAPTION] = tuple(variants)
        return found

    @cached_property
    def text_width(self) -> int | None:
        return None if self[0].text is None else next(iter(self[0].text.values())).shape[-1]

    def close(self) -> None:
        for column in self._columns():
            column.close()


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch. Two are kept, since a batch may span the end of one and the start of
    the next.
    """
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def sample_at(num_samples: int, seed: int, position: int) -> int:
    """Which sample the global position reads: a fresh permutation of all samples in each epoch."""
    epoch, offset = divmod(position, num_samples)
    return int(epoch_order(num_samples, seed, epoch)[offset])


def draw_caption(sample: Sample, weights: Mapping[str, float], seed: int, position: int) -> tuple[str, str]:
    """Name and text of the caption that the sample is seen with at a global position: a name by weight, then
    one of its variants, all alike. Decided by seed and position alone.
    """
    names = list(sample.captions)
    if len(names) == 1 and len(sample.captions[names[0]]) == 1:
        return names[0], sample.captions[names[0]][0]
    variant, fraction = (int(word) for word in np.random.SeedSequence([seed, position]).generate_state(2))
    bounds = np.cumsum([weights[name] for name in names])
    name = names[int(np.searchsorted(bounds[:-1], fraction / 2**32 * bounds[-1], side="right"))]
    return name, sample.captions[name][variant % len(sample.captions[name])]


def make_batch(dataset: ColumnDataset, positions: list[int], seed: int) -> Batch:
    samples = [dataset[sample_at(len(dataset), seed, position)] for position in positions]
    drawn = [
        draw_caption(sample, dataset.weights, seed, position)
        for sample, position in zip(samples, positions, strict=True)
    ]
    features = torch.from_numpy(np.stack([sample.features for sample in samples]))
    text = [
        torch.from_numpy(sample.text[name])
        for sample, (name, _) in zip(samples, drawn, strict=True)
        if sample.text is not None
    ]
    return Batch(
        positions,
        [sample.key for sample in samples],
        [caption for _, caption in drawn],
        features,
        text if dataset.text is not None else None,
    )


def micro_positions(
    step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Global positions of one step's micro-batches on this rank: a contiguous slice of the global batch,
    cut into equal parts.
    """
    per_rank = global_batch_size // world_size
    first = step * global_batch_size + rank * per_rank
    return [
        list(range(start, start + micro_batch_size))
        for start in range(first, first + per_rank, micro_batch_size)
    ]


def batches(
    dataset: ColumnDataset,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch_steps: int = 2,
) -> Iterator[list[Batch]]:
    """The micro-batches of steps `first_step` to `num_steps`, read ahead by a thread.

    Sample i of step s has global position s * global_batch_size + i whatever the world size or the micro-
    batch split, so a run may be stopped and continued at any step, on any number of ranks, and see the
    same samples.
    """
    if micro_batch_size * world_size > global_batch_size or global_batch_size % (
        micro_batch_size * world_size
    ):
        raise ValueError(f"{micro_batch_size=} x {world_size=} must divide {global_batch_size=}")
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=max(1, prefetch_steps))
    stopped = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read_ahead() -> None:
        try:
            for step in range(first_step, num_steps):
                parts = micro_positions(step, global_batch_size, micro_batch_size, rank, world_size)
                put([make_batch(dataset, positions, seed) for positions in parts])
                if stopped.is_set():
                    return
        except (ValueError, OSError) as error:
            put(error)

    thread = threading.Thread(target=read_ahead, name="read_ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first_step, num_steps):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
