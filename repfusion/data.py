"""Columns of WebDataset tars -> batches of features and captions, in an order that a seed and a position
decide.

A column is a folder of tars with the same keys as the images. Tar headers are read once to find where each
member lies; members are then read by offset, so the shuffle is exact over the whole data set and resuming is
one integer.
"""

import hashlib
import io
import json
import mmap
import os
import queue
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

FEATURES = "features.npy"
TEXT = "text.npy"
BLOCK_BYTES = 512


class DataConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Path
    """Folder of image shards; training reads only the captions from it."""
    features: Path
    """Folder of the features column (the `latents` stage)."""
    text: Path | None = None
    """Folder of precomputed prompt features (the `features` stage); needed where the method feeds on them."""
    cache_bytes: int = 2**30
    """Decoded samples kept in memory on each rank, up to this many bytes; 0 reads every sample from its
    tar each time.
    """
    prefetch_steps: int = 2
    """Steps read ahead by a thread, so that the loop does not wait for the disk."""


@dataclass(frozen=True)
class Sample:
    key: str
    captions: tuple[str, ...]
    """The caption, or several that say the same; one is drawn at each visit."""
    features: np.ndarray
    """[n, d] float16."""
    text: np.ndarray | None
    """[m, d] precomputed prompt features, unpadded."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `positions` are global sample positions: they decide order, caption and noise."""

    positions: list[int]
    keys: list[str]
    captions: list[str]
    features: Tensor
    """[b, n, d] float16."""
    text: list[Tensor] | None


def rebuild_hint(shard: Path) -> str:
    return f"delete {shard.name} and its sidecar and re-run the '{shard.parent.name}' stage"


def scan_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Members of a tar as name -> (offset of its bytes, size). ValueError where the tar is cut short or
    not a tar.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: empty file; {rebuild_hint(path)}")
    members: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = 0
        while position + BLOCK_BYTES <= size:
            header = data[position : position + BLOCK_BYTES]
            if header[0] == 0:
                return members
            kind = header[156:157]
            # Extended headers (long names) and old formats are rare in shards: leave them to tarfile, far
            # slower.
            if header[257:262] != b"ustar" or kind not in (b"0", b"\0", b"5"):
                return scan_tar_slowly(path)
            try:
                num_bytes = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            except ValueError as error:
                raise ValueError(f"{path}: no tar header at byte {position}; {rebuild_hint(path)}") from error
            name = header[:100].split(b"\0", 1)[0].decode()
            position += BLOCK_BYTES
            if kind != b"5":
                members[name] = (position, num_bytes)
            if position + num_bytes > size:
                raise ValueError(
                    f"{path}: truncated: {name} needs bytes {position} to {position + num_bytes}, "
                    f"the file has {size}; {rebuild_hint(path)}"
                )
            position += -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
    raise ValueError(
        f"{path}: truncated: the end-of-archive mark is missing after {len(members)} members; "
        f"{rebuild_hint(path)}"
    )


def scan_tar_slowly(path: Path) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(path) as tar:
            return {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar ({error}); {rebuild_hint(path)}") from error


def shard_names(folder: Path) -> list[str]:
    """Shards of a stage folder, in order: those of its manifest, or every tar where there is none."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        names = [str(shard["name"]) for shard in json.loads(manifest.read_text())["shards"]]
        return sorted(name if name.endswith(".tar") else f"{name}.tar" for name in names)
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"{folder}: no shards (*.tar) here; run the stage that writes this folder")
    return names


def manifest_digest(folder: Path) -> str | None:
    """sha256 of a stage's manifest without times and versions: the name of the data. None where there is
    no manifest.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None

    manifest = json.loads(path.read_text())
    content = {key: value for key, value in manifest.items() if key != "seconds"}
    content["shards"] = [
        {key: value for key, value in shard.items() if key not in ("seconds", "versions")}
        for shard in manifest["shards"]
    ]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Column:
    """One member per key in a folder of tars: where each lies, and its bytes."""

    def __init__(self, folder: Path, extension: str, required: bool = True):
        self.folder, self.extension, self.required = folder, extension, required
        self.files: list[int] = []
        self.spans: list[np.ndarray] = []

    def open_shard(self, name: str, keys: list[str], members: dict[str, tuple[int, int]]) -> None:
        path = self.folder / name
        if self.required:
            missing = [key for key in keys if f"{key}.{self.extension}" not in members]
            if missing:
                raise ValueError(
                    f"shard {path}, key {missing[0]}: no member {missing[0]}.{self.extension} "
                    f"({len(missing)} of {len(keys)} keys lack it); {rebuild_hint(path)}"
                )
        absent = (-1, 0)
        self.spans.append(
            np.array([members.get(f"{key}.{self.extension}", absent) for key in keys], np.int64).reshape(
                -1, 2
            )
        )
        self.files.append(os.open(path, os.O_RDONLY))

    def read(self, shard: int, row: int) -> bytes | None:
        offset, size = (int(x) for x in self.spans[shard][row])
        return None if offset < 0 else os.pread(self.files[shard], size, offset)

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop())


def read_array(raw: bytes, path: Path, key: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"shard {path}, key {key}: not a readable npy member ({error}); {rebuild_hint(path)}"
        ) from error


class ColumnDataset:
    """Random access to samples whose captions, features and (optionally) text features lie in separate tars.

    Opening it reads every tar header and checks that all columns hold the same keys and that features
    have one shape and dtype.

    Raises:
        ValueError: a tar is truncated, a key is missing or extra in a column, or a shape or dtype differs;
            the message names the shard, the key and what to run.
    """

    def __init__(self, images: Path, features: Path, text: Path | None = None, cache_bytes: int = 0):
        self.names = shard_names(Path(images))
        self.captions = Column(Path(images), "txt")
        self.metadata = Column(Path(images), "json", required=False)
        self.features = Column(Path(features), FEATURES)
        self.text = None if text is None else Column(Path(text), TEXT)
        self.keys: list[list[str]] = []
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.cache: dict[int, Sample] = {}
        for name in self.names:
            self._open_shard(name)
        self.starts = np.cumsum([0] + [len(keys) for keys in self.keys])
        if len(self) == 0:
            raise ValueError(f"{images}: the shards hold no samples")
        self.shape, self.dtype = (first := self._array(self.features, 0, 0)).shape, first.dtype
        self._check_shards()

    def _open_shard(self, name: str) -> None:
        members = scan_tar(self.captions.folder / name)
        # A sample's members share the part of the name before its first dot (the WebDataset rule).
        keys = list(dict.fromkeys(member.split(".", 1)[0] for member in members))
        self.keys.append(keys)
        self.captions.open_shard(name, keys, members)
        self.metadata.open_shard(name, keys, members)
        for column in (self.features, self.text):
            if column is None:
                continue
            path = column.folder / name
            if not path.exists():
                raise ValueError(f"shard {path} is missing; re-run the '{column.folder.name}' stage")
            members = scan_tar(path)
            column.open_shard(name, keys, members)
            extra = {member.split(".", 1)[0] for member in members} - set(keys)
            if extra:
                raise ValueError(
                    f"shard {path}, key {min(extra)}: not among the {len(keys)} keys of "
                    f"{self.captions.folder / name}; {rebuild_hint(path)}"
                )

    def _check_shards(self) -> None:
        """Every shard's first array has the shape of the first; equal member sizes then hold for the rest
        of the shard.
        """
        for shard, keys in enumerate(self.keys):
            if not keys:
                continue
            self._check_shape(self._array(self.features, shard, 0), shard, keys[0])
            sizes = self.features.spans[shard][:, 1]
            odd = np.flatnonzero(sizes != sizes[0])
            if len(odd):
                self._check_shape(self._array(self.features, shard, int(odd[0])), shard, keys[odd[0]])

    def _check_shape(self, array: np.ndarray, shard: int, key: str) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            path = self.features.folder / self.names[shard]
            raise ValueError(
                f"shard {path}, key {key}: features are {array.shape} {array.dtype}, "
                f"expected {self.shape} {self.dtype}; {rebuild_hint(path)}"
            )

    def _array(self, column: Column, shard: int, row: int) -> np.ndarray:
        raw = column.read(shard, row)
        assert raw is not None
        return read_array(raw, column.folder / self.names[shard], self.keys[shard][row])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        cached = self.cache.get(index)
        if cached is not None:
            return cached
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[shard])
        key = self.keys[shard][row]
        features = self._array(self.features, shard, row)
        self._check_shape(features, shard, key)
        text = None if self.text is None else self._array(self.text, shard, row)
        sample = Sample(key, self._captions(shard, row), features, text)
        num_bytes = features.nbytes + (0 if text is None else text.nbytes) + sum(map(len, sample.captions))
        if self.cached_bytes + num_bytes <= self.cache_bytes:
            self.cache[index] = sample
            self.cached_bytes += num_bytes
        return sample

    def _captions(self, shard: int, row: int) -> tuple[str, ...]:
        raw = self.metadata.read(shard, row)
        captions = json.loads(raw).get("captions") if raw else None
        if captions:
            return tuple(captions)
        raw = self.captions.read(shard, row)
        assert raw is not None
        return (raw.decode().strip(),)

    @cached_property
    def text_width(self) -> int | None:
        return None if self.text is None else self._array(self.text, 0, 0).shape[-1]

    def close(self) -> None:
        for column in (self.captions, self.metadata, self.features, self.text):
            if column is not None:
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


def make_batch(dataset: ColumnDataset, positions: list[int], seed: int) -> Batch:
    samples = [dataset[sample_at(len(dataset), seed, position)] for position in positions]
    captions = [
        sample.captions[0]
        if len(sample.captions) == 1
        else sample.captions[
            int(np.random.SeedSequence([seed, position]).generate_state(1)[0]) % len(sample.captions)
        ]
        for sample, position in zip(samples, positions, strict=True)
    ]
    features = torch.from_numpy(np.stack([sample.features for sample in samples]))
    text = None if dataset.text is None else [torch.from_numpy(sample.text) for sample in samples]
    return Batch(positions, [sample.key for sample in samples], captions, features, text)


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
