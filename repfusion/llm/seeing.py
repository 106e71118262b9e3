"""What families of models that see have alike."""

from typing import Any

from torch import nn

from repfusion.llm.base import LanguageModel
from repfusion.llm.projector import Projector


class SeeingByTemplate(LanguageModel):
    """The language model of one that sees, is asked by a chat template alone, and takes no latents."""

    sees = True
    needs_template = True
    takes_latents = False

    @classmethod
    def parts(cls, model: Any) -> tuple[nn.Module, nn.Module, Projector | None]:
        """The language model and its head; what leads into it from the tower takes no latents."""
        return model.model.language_model, model.lm_head, None


def check_one_layer(config: Any) -> None:
    """Raises ValueError where a projector reads several layers of its tower."""
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"reads layers {config.vision_feature_layer} of its tower; expected a single layer")
