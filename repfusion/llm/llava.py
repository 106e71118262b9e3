"""LLaVA (`LlavaForConditionalGeneration`): its language model, its head and its projector."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from repfusion.llm.projector import Projector


def load_llava(folder: Path, config: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Projector]:
    """The language model without its head, the head, and the projector.

    Args:
        folder: as written by save_pretrained.
        config: transformers' config of the folder.
        dtype: precision of the language model's weights; the projector is float32.

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
