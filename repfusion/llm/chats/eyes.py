"""The part of a model that sees: images -> tokens of the language model, each family in its own file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.pretrained.config import processor_fields, said_of

MIN_SIDE = 2
"""Fewest pixels of an image's side: those of one line show nothing, and some processors fail on them."""


@dataclass(frozen=True)
class Look:
    """An image as a vision tower takes it, on the CPU and float32, and the tokens that it becomes."""

    views: tuple[Int[Tensor, "_ 2"], ...]
    """Row and column of each token in the view that it is of: the image, or its tiles together and then its
    thumbnail.
    """
    inputs: dict[str, Tensor]
    """Tensors by name; those of several images are joined along the first axis."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all views."""
        return sum(map(len, self.views))


def in_rows(num_rows: int, num_columns: int) -> Int[Tensor, "n 2"]:
    """Row and column of the tokens of a grid, row by row."""
    return torch.cartesian_prod(torch.arange(num_rows), torch.arange(num_columns))


def beside(views: Sequence[Int[Tensor, "_ 2"]]) -> Int[Tensor, "n 2"]:
    """Rows and columns of views that stand beside each other, from column -1 to the left, in their order: no
    two tokens at one place, and none of them elsewhere for the views after its own.
    """
    placed, edge = [torch.empty(0, 2, dtype=torch.long)], 0
    for view in views:
        edge -= int(view[:, 1].max()) + 1
        placed.append(view + torch.tensor([0, edge]))
    return torch.cat(placed)


class Eyes(nn.Module):
    """A frozen vision tower with what leads from it into the language model, and the image processor.

    Args:
        model: transformers' model of tower and language model, the latter taken out.
        processor: transformers' image processor of the family.
        image_id: the token that stands for each token of an image.
        image_token: that token as text.
    """

    def __init__(self, model: Any, processor: Any, image_id: int, image_token: str):
        super().__init__()
        model.language_model = None  # the language model has an owner
        self.model = model.requires_grad_(False)
        self.processor = processor
        self.image_id, self.image_token = image_id, image_token
        self.eval()

    def look(self, image: np.ndarray) -> Look:
        """An image, uint8 [h, w, 3], as the tower takes it.

        Raises:
            ValueError: it is of another mode or type, one pixel wide or high, or too long for the processor.
        """
        check_image(image)
        height, width = image.shape[:2]
        try:
            return self._look(image)
        except ValueError as error:
            raise ValueError(f"image of {width} x {height} px: {error}") from error

    def process(self, image: np.ndarray, **options: Any) -> Any:
        """What the image processor makes of an image."""
        return self.processor(image, input_data_format="channels_last", return_tensors="pt", **options)

    def _look(self, image: np.ndarray) -> Look:
        raise NotImplementedError

    def expanded(self, num_tokens: int) -> str:
        """The text that stands in the place of an image of so many tokens."""
        return self.image_token * num_tokens

    def positions(
        self,
        ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        is_image: Bool[Tensor, "b n"],
        images: Mapping[str, Tensor],
    ) -> Int[Tensor, "*axes b n"]:
        """Position ids of a batch with images, which count real tokens only."""
        return text_positions(mask)

    def flops(self, images: Mapping[str, Tensor]) -> int | None:
        """FLOPs of seeing images, 2 a multiply-add, where the code cannot be run without memory, so that
        nobody can count them; None where it can.
        """
        return None

    @torch.no_grad()
    def see(
        self, images: Mapping[str, Tensor], is_image: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "k c"], dict[str, Any]]:
        """Tokens of all images in order, and what else the language model reads of them."""
        raise NotImplementedError


def text_positions(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Position ids of left-padded rows, which count real tokens only."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def check_image(image: np.ndarray) -> None:
    """Raises ValueError for anything but uint8 [h, w, 3] with sides of two pixels or more."""
    remedy = "read it with repfusion.images.decode.read_pixels, which makes RGB of any mode"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        shape, dtype = getattr(image, "shape", "no shape"), getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"image is {shape} {dtype}, expected RGB, (height, width, 3) uint8: {remedy}")
    if min(image.shape[:2]) < MIN_SIDE:
        height, width = image.shape[:2]
        raise ValueError(f"image is {width} x {height} px, expected {MIN_SIDE} px a side or more")


def image_processor(processor_class: Any, folder: Path, **defaults: Any) -> Any:
    """An image processor of transformers with what a folder says of it, or these defaults.

    Raises:
        ValueError: the folder says nothing and there are no defaults, or what no such processor takes.
    """
    fields, name = processor_fields(folder, "MLLM")
    if not fields and not defaults:
        raise ValueError(
            f"MLLM folder {folder}: no {name}; copy it from where the model is from, or save_pretrained its "
            "processor there"
        )
    with said_of(f"MLLM folder {folder}", f"by its {name}"):
        return processor_class.from_dict(defaults | fields)
