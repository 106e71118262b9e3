"""A plain causal language model, without eyes: the language-only twin."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from repfusion.llm.base import LanguageModel
from repfusion.llm.projector import Projector


class CausalLM(LanguageModel):
    """A causal language model of transformers; whoever projects into it starts with a fresh projector."""

    @classmethod
    def load_parts(
        cls, folder: Path, config: Any, dtype: torch.dtype
    ) -> tuple[nn.Module, nn.Module, Projector | None]:
        """The language model and its head; there is no projector."""
        causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return causal.model, causal.lm_head, None
