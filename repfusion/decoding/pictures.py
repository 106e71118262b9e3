"""A folder of image shards -> batches of pixels, each a function of its step."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from repfusion.data.columns import rebuild_hint, scan_tar, shard_names
from repfusion.data.order import hash64, is_held_out
from repfusion.data.source_images import IMAGE_EXTENSIONS
from repfusion.images.decode import read_pixels
from repfusion.images.limits import BadImage
from repfusion.images.square import square
from repfusion.tars import split_name

DECODERS = 4
"""Images that are decoded at once."""


@dataclass(frozen=True, slots=True)
class _Place:
    shard: Path
    key: str
    offset: int
    size: int


class ImageShards:
    """The images of a folder's shards, those of a share of the keys apart.

    Args:
        folder: of image shards.
        side: of the square images that are given, in px.
        held_out_share: what share of the keys is held out.

    Raises:
        ValueError: the folder holds no shards, or no image to train on.
    """

    def __init__(self, folder: Path, side: int, held_out_share: float):
        self.side = side
        every = [place for name in shard_names(folder) for place in _images_of(folder / name)]
        self.held_out = [one for one in every if is_held_out(one.key, held_out_share)]
        self.drawn = [one for one in every if not is_held_out(one.key, held_out_share)]
        self._pool = ThreadPoolExecutor(DECODERS, "decode")
        if not self.drawn:
            raise ValueError(f"{folder}: none of its {len(every)} images is left to train on")

    def batch(self, step: int, seed: int, numbers: Iterable[int]) -> UInt8[Tensor, "b h w 3"]:
        """Images of these numbers in the batch of a step, drawn from all of them with equal chances."""
        return self._read(self._place(step, seed, number) for number in numbers)

    def keys(self, step: int, seed: int, numbers: Iterable[int]) -> list[str]:
        """The keys of these images."""
        return [self._place(step, seed, number).key for number in numbers]

    def _place(self, step: int, seed: int, number: int) -> _Place:
        return self.drawn[hash64("picture", seed, step, number) % len(self.drawn)]

    def measured(self, most: int) -> UInt8[Tensor, "b h w 3"]:
        """The first so many images that are held out; where none is, of those that are trained on."""
        return self._read((self.held_out or self.drawn)[:most])

    def _read(self, places: Iterable[_Place]) -> UInt8[Tensor, "b h w 3"]:
        return torch.from_numpy(np.stack(list(self._pool.map(self._one, places))))

    def _one(self, place: _Place) -> UInt8[np.ndarray, "h w 3"]:
        with place.shard.open("rb") as stream:
            stream.seek(place.offset)
            data = stream.read(place.size)
        try:
            return square(read_pixels(data), self.side)
        except BadImage as error:
            raise ValueError(f"{place.shard}: {place.key}: {error}; {rebuild_hint(place.shard)}") from error


def _images_of(path: Path) -> list[_Place]:
    """The target image of each sample of a shard."""
    found = []
    for member, (offset, size) in scan_tar(path).items():
        name = split_name(member)
        if name is not None and name[1] in IMAGE_EXTENSIONS:
            found.append(_Place(path, name[0], offset, size))
    return found
