"""A plain causal language model, without eyes: the language-only twin."""

from typing import Any

from torch import nn

from repfusion.llm.base import LanguageModel
from repfusion.llm.projector import Projector


class CausalLM(LanguageModel):
    """A causal language model of transformers; whoever projects into it starts with a fresh projector."""

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """The class that transformers has for the folder's `model_type`."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    @classmethod
    def parts(cls, model: Any) -> tuple[nn.Module, nn.Module, Projector | None]:
        """The language model and its head; there is no projector."""
        return model.model, model.lm_head, None
