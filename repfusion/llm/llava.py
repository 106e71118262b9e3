"""LLaVA (`LlavaForConditionalGeneration`): its language model, its head and its projector."""

from typing import Any

from torch import nn

from repfusion.llm.base import LanguageModel
from repfusion.llm.projector import Projector


class Llava(LanguageModel):
    """A LLaVA without its vision tower: noisy latents take the place of what that sees."""

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """LlavaForConditionalGeneration.

        Raises:
            ValueError: where the projector reads several layers of its tower.
        """
        from transformers import LlavaForConditionalGeneration

        if not isinstance(config.vision_feature_layer, int):
            raise ValueError(
                f"reads layers {config.vision_feature_layer} of its tower; expected a single layer"
            )
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
