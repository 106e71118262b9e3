"""Low-rank adaptation (LoRA, arXiv 2106.09685, eq. 3) of a frozen language model, by peft: beside each chosen
linear layer W of every transformer layer stands (alpha / rank) * B A, of which B is zero at first.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from repfusion.config import Config
from repfusion.llm.base import LanguageModel


class LoraConfig(Config):
    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """What is added is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Linear layers that are adapted, by their own name in every transformer layer."""


def add_lora(llm: LanguageModel, config: LoraConfig, is_trained: bool) -> tuple[str, ...]:
    """Puts A [rank, in] and B [out, rank] beside the linear layers of `llm` that the settings name, float32;
    what the language model says does not change. All other weights stay as they are, frozen.

    Args:
        llm: changed in place: its weights W have the names that peft gives them.
        config: which layers, and how much.
        is_trained: whether A and B train; else they are as frozen as W.

    Returns: The names of A and B within `llm`.

    Raises: ValueError: some transformer layer has no linear layer of a name.
    """
    names = adaptable(llm.layers)
    if missing := [target for target in config.targets if target not in names]:
        raise ValueError(
            f"lora.targets {', '.join(missing)}: no linear layers of the transformer layers of MLLM "
            f"{llm.folder}, a {type(llm.language_model).__name__}; expected some of {', '.join(names)}"
        )
    # here and not above: it takes a second, and few methods have such weights
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    before = set(map(id, llm.parameters()))
    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=[*config.targets])
    inject_adapter_in_model(settings, llm.language_model)
    added = {name: p for name, p in llm.named_parameters() if id(p) not in before}
    for parameter in added.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(is_trained)
    return tuple(added)


def adaptable(layers: Sequence[nn.Module]) -> list[str]:
    """Own names of the linear layers that every one of the transformer layers has, in order."""
    linear = [
        [name.rpartition(".")[2] for name, one in layer.named_modules() if isinstance(one, nn.Linear)]
        for layer in layers
    ]
    return [name for name in linear[0] if all(name in names for names in linear)]
