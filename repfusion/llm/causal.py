"""A plain causal language model, without eyes: the language-only twin."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def load_causal(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The language model without its head, and the head."""
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return causal.model, causal.lm_head
