"""InternVL (`InternVLForConditionalGeneration`): an image as tiles of the best fitting grid and a thumbnail,
each of the same number of tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repfusion.llm.chats.eyes import Eyes, Look, image_processor, in_rows
from repfusion.llm.seeing import SeeingByTemplate, check_one_layer

MARKS = {"start_image_token": "<img>", "end_image_token": "</img>"}
"""Tokens around an image, by the tokenizer's name of each, and what they are where it names none."""


class InternVL(SeeingByTemplate):
    """The language model of an InternVL."""

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """InternVLForConditionalGeneration.

        Raises:
            ValueError: where the projector reads several layers of its tower.
        """
        from transformers import InternVLForConditionalGeneration

        check_one_layer(config)
        return InternVLForConditionalGeneration

    @classmethod
    def open_eyes(cls, model: Any, tokenizer: Any, folder: Path) -> Eyes:
        """Tower and projector.

        Raises:
            ValueError: the image processor's file is missing or makes tiles of another size than the tower
                reads.
        """
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        processor = image_processor(GotOcr2ImageProcessorPil, folder)
        makes = processor.size.height, processor.size.width
        reads = tuple(model.config.vision_config.image_size)
        if makes != reads:
            raise ValueError(
                f"MLLM folder {folder}: its image processor makes tiles of {makes} px, the tower reads "
                f"{reads}; use the processor that it was trained with"
            )
        image_id = model.config.image_token_id
        eyes = InternEyes(model.model, processor, image_id, tokenizer.convert_ids_to_tokens(image_id))
        eyes.around = tuple(getattr(tokenizer, name, None) or text for name, text in MARKS.items())
        return eyes


class InternEyes(Eyes):
    """A tower of tiles; the last of several tiles is the thumbnail, the whole image in one."""

    around: tuple[str, ...] = tuple(MARKS.values())

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of a tile's tokens."""
        config = self.model.config
        sides = zip(config.vision_config.image_size, config.vision_config.patch_size, strict=True)
        rows, columns = (int(side // patch * config.downsample_ratio) for side, patch in sides)
        return rows, columns

    def _look(self, image: np.ndarray) -> Look:
        tiles = self.process(image, crop_to_patches=True)["pixel_values"]
        return Look(self._views(image, len(tiles)), {"pixel_values": tiles})

    def _views(self, image: np.ndarray, num_tiles: int) -> tuple[Int[Tensor, "_ 2"], ...]:
        """The tiles in their grid, which the processor lets nobody know, and the thumbnail."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        size, least, most = self.processor.size, self.processor.min_patches, self.processor.max_patches
        columns, rows = get_optimal_tiled_canvas(image.shape[:2], (size.height, size.width), least, most)
        assert num_tiles == rows * columns + (rows * columns > 1)
        tile = in_rows(*self.tile_grid)
        corners = in_rows(rows, columns) * torch.tensor(self.tile_grid)
        tiled = torch.cat([tile + corner for corner in corners])
        return (tiled,) if rows * columns == 1 else (tiled, tile)

    def expanded(self, num_tokens: int) -> str:
        """The image's tokens between its marks."""
        start, end = self.around
        return f"{start}{self.image_token * num_tokens}{end}"

    @torch.no_grad()
    def see(
        self, images: Mapping[str, Tensor], is_image: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "k c"], dict[str, Any]]:
        """Tokens of all tiles of all images."""
        return self.model.get_image_features(images["pixel_values"]).pooler_output.flatten(0, 1), {}
