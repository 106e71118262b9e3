"""Columns of WebDataset tars -> samples, joined by key.

A column is a folder of tars with the same keys as the images. Members are read by offset, so samples are read
in any order.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from repfusion.data.columns import Column, Keys, rebuild_hint, scan_tar, shard_names
from repfusion.data.config import CAPTION, CAPTIONS, MAIN_CAPTION_ONLY, DatasetConfig, check_weights
from repfusion.data.order import is_held_out
from repfusion.data.readers import Reader
from repfusion.data.source_images import PictureMembers, is_picture, is_source

SAMPLE_BYTES = 1000
"""What a sample takes in the cache beside its texts and arrays."""


class Sample:
    """One key of a data set. Its captions are read at once, members of columns when they are asked for; what
    was read stays in memory while the data set's cache has room.
    """

    def __init__(self, dataset: "ColumnDataset", shard: int, row: int):
        self.dataset, self.shard, self.row = dataset, shard, row
        self.key = dataset.images.key(shard, row)
        self.captions = dataset.read_captions(shard, row)
        """Texts under each name that has a weight: the caption, or several that say the same."""
        self.is_kept = False
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """How often each caption is drawn, by name."""
        return self.dataset.weights

    @property
    def place(self) -> str:
        """Where it lies, as messages name it."""
        return self.dataset.images.place(self.shard, self.row)

    @property
    def num_bytes(self) -> int:
        """Bytes of the captions, and about what Python needs to hold them."""
        return SAMPLE_BYTES + sum(len(text) for texts in self.captions.values() for text in texts)

    def read(self, column: str, caption: str = CAPTION) -> np.ndarray | None:
        """The sample's array of a column, that of a caption where the column has one for each; None where the
        data set has no such column.
        """
        if column not in self.dataset.columns:
            return None
        member = self.dataset.readers[column].member(column, caption)
        return self._kept(member, lambda: self.dataset.read_array(column, member, self.shard, self.row))

    @property
    def num_sources(self) -> int:
        """How many source pictures it has; 0 where the data set was opened without images."""
        return len(self.dataset.pictures.sources(self.shard, self.row))

    def sources(self) -> tuple[UInt8[np.ndarray, "*f _ _ 3"], ...]:
        """Source pictures, as the caption counts them; of a clip its frames."""
        return tuple(self._picture(name) for name in self.dataset.pictures.sources(self.shard, self.row))

    def target(self) -> UInt8[np.ndarray, "*f _ _ 3"] | None:
        """The image that it shows, or the frames of its clip; None where the data set was opened without
        images, or has none of it.
        """
        name = self.dataset.pictures.target(self.shard, self.row)
        return None if name is None else self._picture(name)

    def _picture(self, member: str) -> UInt8[np.ndarray, "*f _ _ 3"]:
        return self._kept(member, lambda: self.dataset.pictures.read(member, self.shard, self.row))

    def _kept(self, member: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """An array of the sample, from memory where it was read before and there was room."""
        if (known := self._arrays.get(member)) is not None:
            return known
        array = read()
        if self.is_kept and self.dataset.has_room(array.nbytes):
            self.dataset.cached_bytes += array.nbytes
            self._arrays[member] = array
        return array


class ColumnDataset:
    """Random access to samples whose captions and columns lie in separate tars.

    Opening it reads every tar header and checks that all columns hold the same keys, that every sample has a
    caption that may be drawn, with its member of the columns that have one a caption, and that arrays of a
    dense column have one shape and dtype.

    Args:
        images: folder of image shards, which hold the main captions.
        columns: folders by name.
        readers: how the model reads the columns that it can use, by name; other columns are not opened.
        cache_bytes: decoded samples kept in memory.
        caption_weights: how often each caption is drawn; see `DatasetConfig`.
        reads_images: whether the model conditions on images, so that source pictures are found.
        held_out_share: what share of the samples is not there, for evaluation.

    Raises: ValueError: a column that the model needs is not given, a tar is truncated, a key is missing or
        extra in a column, a shape or dtype differs, or a model that reads no images would be shown the
        instructions of editing samples; the message names the shard, the key and what to run.
    """

    def __init__(
        self,
        images: Path,
        columns: Mapping[str, Path],
        readers: Mapping[str, Reader],
        cache_bytes: int = 0,
        caption_weights: Mapping[str, float] = MAIN_CAPTION_ONLY,
        reads_images: bool = False,
        held_out_share: float = 0.0,
    ):
        self.held_out_share = held_out_share
        self.weights = check_weights(caption_weights, CAPTIONS in columns)
        others = tuple(name for name in self.weights if name != CAPTION)
        self.readers = dict(readers)
        self.images = Column(images, (CAPTION,), ("json",), is_picture if reads_images else is_source)
        self.pictures = PictureMembers(self.images, reads_images)
        self.captions = Column(columns[CAPTIONS], (), others) if others else None
        self.columns = {name: self._column(name, columns[name]) for name in readers if name in columns}
        if absent := [name for name, one in readers.items() if one.is_required and name not in columns]:
            raise ValueError(
                f"data.columns has no {absent[0]!r}, which the model reads; it has {sorted(columns)}: run "
                f"the '{absent[0]}' stage and name its folder"
            )
        self.names = shard_names(images)
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.cache: dict[int, Sample] = {}
        for name in self.names:
            self._open_shard(name)
        self.keys = self.images.keys
        self.starts = np.cumsum([0] + [len(keys) for keys in self.keys])
        self.kept = self._not_held_out() if held_out_share else None
        if len(self) == 0:
            raise ValueError(f"{images}: the shards hold no samples")
        self._check_captions()
        if CAPTION in self.weights:
            self.pictures.check_read()
        for name in self.columns:
            if readers[name].is_dense:
                self._check_shards(name)

    @classmethod
    def open(
        cls,
        config: DatasetConfig,
        readers: Mapping[str, Reader],
        cache_bytes: int = 0,
        reads_images: bool = False,
    ) -> "ColumnDataset":
        weights = config.caption_weights
        held_out = config.held_out_share
        return cls(config.images, config.columns, readers, cache_bytes, weights, reads_images, held_out)

    def _not_held_out(self) -> np.ndarray:
        """Places of the samples that training draws, among all."""
        keys = (key for own in self.keys for key in own)
        drawn = (not is_held_out(key.decode(), self.held_out_share) for key in keys)
        return np.flatnonzero(np.fromiter(drawn, bool, int(self.starts[-1]))).astype(np.uint32)

    def _column(self, name: str, folder: Path) -> Column:
        members = dict.fromkeys(self.readers[name].member(name, caption) for caption in self.weights)
        return (
            Column(folder, tuple(members))
            if self.readers[name].is_dense
            else Column(folder, (), tuple(members))
        )

    def _all(self) -> Iterator[Column]:
        yield from (column for column in (self.images, self.captions, *self.columns.values()) if column)

    def _open_shard(self, name: str) -> None:
        keys: Keys | None = None
        for column in self._all():
            keys = column.open_shard(name, keys)

    def _caption_column(self, name: str) -> Column:
        column = self.images if name == CAPTION else self.captions
        assert column is not None
        return column

    def _check_captions(self) -> None:
        """Every caption with a weight occurs, every sample has one of them, each with its member of the
        columns that have one a caption.
        """
        by_caption = {name: one for name, one in self.columns.items() if not self.readers[name].is_dense}
        seen = dict.fromkeys(self.weights, 0)
        for shard, keys in enumerate(self.keys):
            drawable = np.zeros(len(keys), bool)
            for name in self.weights:
                present = self._caption_column(name).has(name, shard)
                seen[name] += int(present.sum())
                drawable |= present
                for column, opened in by_caption.items():
                    opened.check_present(self.readers[column].member(column, name), shard, present)
            if not drawable.all():
                column = self._caption_column(next(iter(self.weights)))
                raise ValueError(
                    f"{column.place(shard, int(drawable.argmin()))}: none of the captions "
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

    @cached_property
    def forms(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of the first sample's array of each dense column."""
        dense = [name for name in self.columns if self.readers[name].is_dense]
        members = {name: self.readers[name].member(name, CAPTION) for name in dense}
        first = next(shard for shard, keys in enumerate(self.keys) if len(keys))
        arrays = {name: self.columns[name].read_array(members[name], first, 0) for name in dense}
        return {name: (array.shape, array.dtype) for name, array in arrays.items()}

    def _check_shards(self, name: str) -> None:
        """Every shard's first array of a dense column has the shape of the first; equal member sizes then
        hold for the rest of the shard.
        """
        column, member = self.columns[name], self.readers[name].member(name, CAPTION)
        for shard, keys in enumerate(self.keys):
            if not len(keys):
                continue
            self.read_array(name, member, shard, 0)
            sizes = column.spans[member][shard][:, 1]
            odd = np.flatnonzero(sizes != sizes[0])
            if len(odd):
                self.read_array(name, member, shard, int(odd[0]))

    def read_array(self, name: str, member: str, shard: int, row: int) -> np.ndarray:
        """A member of a column. ValueError where it is damaged, or of another form in a dense column."""
        column = self.columns[name]
        array = column.read_array(member, shard, row)
        if self.readers[name].is_dense and (array.shape, array.dtype) != self.forms[name]:
            shape, dtype = self.forms[name]
            raise ValueError(
                f"{column.place(shard, row)}: {name} are {array.shape} {array.dtype}, expected {shape} "
                f"{dtype}; {rebuild_hint(column.path(shard))}"
            )
        return array

    def read_captions(self, shard: int, row: int) -> dict[str, tuple[str, ...]]:
        """A sample's captions by name, each with its variants that say the same."""
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

    def rows_above(self, shard: int, num_bytes: int) -> list[int]:
        """Rows of a shard that may have a caption of more bytes: by the sizes of its members alone. The json
        may hold variants of the main one.
        """
        found = [self._caption_column(name).spans[name][shard][:, 1] for name in self.weights]
        if CAPTION in self.weights:
            found.append(self.images.spans["json"][shard][:, 1])
        return np.flatnonzero(np.max(found, axis=0) > num_bytes).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.kept is None else len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        if (cached := self.cache.get(index)) is not None:
            return cached
        place = index if self.kept is None else int(self.kept[index])
        shard = int(np.searchsorted(self.starts, place, side="right")) - 1
        sample = Sample(self, shard, place - int(self.starts[shard]))
        if self.has_room(sample.num_bytes):
            self.cache[index], sample.is_kept = sample, True
            self.cached_bytes += sample.num_bytes
        return sample

    def has_room(self, num_bytes: int) -> bool:
        """Whether the cache takes so many bytes more."""
        return self.cached_bytes + num_bytes <= self.cache_bytes

    @cached_property
    def widths(self) -> dict[str, int]:
        """Channels of the first sample's array of each column that has one a caption."""
        first = self[0]
        names = [name for name in self.columns if not self.readers[name].is_dense]
        arrays = {name: first.read(name, next(iter(first.captions))) for name in names}
        return {
            name: array.shape[-1] for name, array in arrays.items() if array is not None and array.ndim > 1
        }

    @property
    def folders(self) -> dict[str, Path]:
        """Folders of the images and of the columns that are read, by name."""
        captions = {} if self.captions is None else {CAPTIONS: self.captions}
        opened = {"images": self.images, **self.columns, **captions}
        return {name: column.folder for name, column in opened.items()}

    def close(self) -> None:
        for column in self._all():
            column.close()
