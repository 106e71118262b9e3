"""LLaVA (`LlavaForConditionalGeneration`): its language model, its head and its projector."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from repfusion.llm.base import LanguageModel
from repfusion.llm.projector import Projector


class Llava(LanguageModel):
    """A LLaVA without its vision tower: noisy latents take the place of what that sees."""

    @classmethod
    def load_parts(
        cls, folder: Path, config: Any, dtype: torch.dtype
    ) -> tuple[nn.Module, nn.Module, Projector | None]:
        """The language model, its head and the projector, which is float32.

        Raises:
            ValueError: where the projector reads several layers of its tower.
        """
        llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        if not isinstance(config.vision_feature_layer, int):
            raise ValueError(
                f"MLLM folder {folder}: reads layers {config.vision_feature_layer} of its tower; "
                "expected a single layer"
            )
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        projector = Projector(*widths, config.projector_hidden_act, config.multimodal_projector_bias)
        projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
        return llava.model.language_model, llava.lm_head, projector
