"""Qwen2.5-VL and Qwen3-VL: images of any size, at positions of time, row and column (MRoPE); Qwen3-VL's tower
also speaks to the first layers of the language model (DeepStack).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.llm.chats.eyes import Eyes, Look, image_processor, in_rows
from repfusion.llm.seeing import SeeingByTemplate


class QwenVL(SeeingByTemplate):
    """The language model of a Qwen-VL."""

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """The class that transformers has for the folder's `model_type`."""
        import transformers

        if config.model_type == "qwen3_vl":
            return transformers.Qwen3VLForConditionalGeneration
        return transformers.Qwen2_5_VLForConditionalGeneration

    @classmethod
    def open_eyes(cls, model: Any, tokenizer: Any, folder: Path) -> Eyes:
        """Tower and merger.

        Raises:
            ValueError: the image processor's file is missing or cuts other patches than the tower reads.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = image_processor(Qwen2VLImageProcessorPil, folder)
        vision = model.config.vision_config
        cuts = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        reads = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        if cuts != reads:
            raise ValueError(
                f"MLLM folder {folder}: its image processor has (patch, merge, temporal patch) sizes {cuts}, "
                f"the tower {reads}; use the processor that it was trained with"
            )
        image_id = model.config.image_token_id
        return QwenEyes(model.model, processor, image_id, tokenizer.convert_ids_to_tokens(image_id))


class QwenEyes(Eyes):
    """A tower of patches, of which squares become a token each."""

    def _look(self, image: np.ndarray) -> Look:
        found = self.process(image)
        _, rows, columns = (found["image_grid_thw"][0] // self.processor.merge_size).tolist()
        inputs = {name: found[name] for name in ("pixel_values", "image_grid_thw")}
        return Look((in_rows(rows, columns),), inputs)

    def positions(
        self,
        ids: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"],
        is_image: Bool[Tensor, "b n"],
        images: Mapping[str, Tensor],
    ) -> Int[Tensor, "*axes b n"]:
        """Time, row and column [3, b, n]: an image takes as many positions as its longer side has tokens."""
        return self.model.get_rope_index(
            ids, is_image.int(), image_grid_thw=images["image_grid_thw"], attention_mask=mask
        )[0]

    def flops(self, images: Mapping[str, Tensor]) -> int:
        """FLOPs of every matrix product: the tower asks for the values of its grids, so that it is not run
        without memory. Patches pass its blocks and squares of patches its mergers; patches see each other
        within an image, or, in Qwen2.5-VL's windowed blocks, within a window.
        """
        visual, grid = self.model.visual, images["image_grid_thw"]
        num_patches = int(grid.prod(1).sum())
        per_patch, per_token = visual.patch_embed.proj.weight.numel(), 0
        for name, module in visual.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("blocks."):
                per_patch += module.weight.numel()
            elif isinstance(module, nn.Linear):
                per_token += module.weight.numel()
        products = num_patches * per_patch + num_patches // self.processor.merge_size**2 * per_token
        width = visual.config.hidden_size
        pairs = sum(self._num_pairs(number, grid) for number in range(len(visual.blocks)))
        return 2 * products + 4 * width * pairs

    def _num_pairs(self, number: int, grid: Int[Tensor, "i 3"]) -> int:
        """Pairs of patches of which one sees the other in block `number`."""
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

        visual = self.model.visual
        edges = get_vision_cu_seqlens(grid)
        if number not in getattr(visual, "fullatt_block_indexes", range(len(visual.blocks))):
            sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
            edges = get_vision_window_index(grid, *sizes)[1]
        return int(edges.diff().long().square().sum())

    @torch.no_grad()
    def see(
        self, images: Mapping[str, Tensor], is_image: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "k c"], dict[str, Any]]:
        """Tokens of all images, and for Qwen3-VL what is added to them after the first layers."""
        seen = self.model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        deep = getattr(seen, "deepstack_features", None)
        more = {}
        if deep is not None:
            more["visual_pos_masks"] = is_image
            more["deepstack_visual_embeds"] = [torch.cat(tuple(features)) for features in deep]
        return torch.cat(tuple(seen.pooler_output)), more
