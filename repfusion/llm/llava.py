"""LLaVA (`LlavaForConditionalGeneration`): its language model, its head, its projector and its eyes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.eyes import Eyes, Look, image_processor, in_rows
from repfusion.llm.projector import Projector
from repfusion.llm.seeing import check_one_layer
from repfusion.pretrained.config import processor_fields


class Llava(LanguageModel):
    """A LLaVA, as a rule without its vision tower: noisy latents take the place of what that sees."""

    sees = True

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """LlavaForConditionalGeneration.

        Raises:
            ValueError: where the projector reads several layers of its tower.
        """
        from transformers import LlavaForConditionalGeneration

        check_one_layer(config)
        return LlavaForConditionalGeneration

    @classmethod
    def parts(cls, model: Any) -> tuple[nn.Module, nn.Module, Projector | None]:
        """The language model, its head and the projector, which is float32."""
        config, own = model.config, model.model.multi_modal_projector
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        with own.linear_1.weight.device:
            projector = Projector(*widths, config.projector_hidden_act, config.multimodal_projector_bias)
        projector.load_state_dict(own.state_dict())
        return model.model.language_model, model.lm_head, projector

    @classmethod
    def open_eyes(cls, model: Any, tokenizer: Any, folder: Path) -> Eyes:
        """Tower and projector, as they were trained. Raises ValueError where the folder says of its image
        processor what no such processor takes.
        """
        image_id = model.config.image_token_id
        processor = _processor(folder, model.config.vision_config)
        return LlavaEyes(model.model, processor, image_id, tokenizer.convert_ids_to_tokens(image_id))


class LlavaEyes(Eyes):
    """A tower of images of one size, each of the same number of tokens."""

    @property
    def places(self) -> Int[Tensor, "n 2"]:
        """Row and column of each token of an image. A CLIP tower's begin with a class token, which has a row
        of its own below, and the default strategy drops the first token.
        """
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        places = in_rows(side, side)
        if config.vision_config.model_type == "clip_vision_model":
            places = torch.cat([torch.tensor([[side, 0]]), places])
        return places[config.vision_feature_select_strategy == "default" :]

    def _look(self, image: np.ndarray) -> Look:
        return Look((self.places,), {"pixel_values": self.process(image)["pixel_values"]})

    @torch.no_grad()
    def see(
        self, images: Mapping[str, Tensor], is_image: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "k c"], dict[str, Any]]:
        """Tokens of all images."""
        pixels = images["pixel_values"].to(self.model.dtype)
        return torch.cat(tuple(self.model.get_image_features(pixels).pooler_output)), {}


def _processor(folder: Path, vision: Any) -> Any:
    """The image processor of a folder; where that says no size, images are as large as the tower's."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    named = str(processor_fields(folder, "MLLM")[0].get("image_processor_type", vision.model_type)).lower()
    square = {"height": vision.image_size, "width": vision.image_size}
    if named.startswith("siglip"):
        return image_processor(SiglipImageProcessorPil, folder, size=square)
    kind = LlavaImageProcessorPil if named.startswith("llava") else CLIPImageProcessorPil
    return image_processor(kind, folder, size={"shortest_edge": vision.image_size}, crop_size=square)
