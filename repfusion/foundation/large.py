"""A LLaVA -> the weights of a larger one over the same tower that says exactly the same (after Net2Net, arXiv
1511.05641; here new channels, heads, units and layers read at random and write zeros).
"""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration


@torch.no_grad()
def grow(small: LlavaForConditionalGeneration, large: LlavaForConditionalGeneration) -> None:
    """Gives a freshly made LLaVA what a smaller one over the same tower says; its new layers stand as evenly
    as they can between the old ones.

    In the residual stream the new channels are zero at first. An RMSNorm divides by the mean over all
    channels, so its weights on the old ones shrink by the root of the widening, and its epsilon with that.
    """
    large.model.vision_tower.load_state_dict(small.model.vision_tower.state_dict())
    old, new = small.model.language_model, large.model.language_model
    narrow_config, wide_config = small.config.get_text_config(), large.config.get_text_config()
    shrink = (narrow_config.hidden_size / wide_config.hidden_size) ** 0.5
    for wide, narrow in zip(*(projector_layers(model) for model in (large, small)), strict=True):
        place(wide, narrow, writes=narrow is small.model.multi_modal_projector.linear_2)
    new.embed_tokens.weight.zero_()
    new.embed_tokens.weight[:, : old.embed_tokens.embedding_dim] = old.embed_tokens.weight
    place(large.lm_head, small.lm_head, writes=False)
    wide_config.rms_norm_eps = narrow_config.rms_norm_eps * shrink**2
    for module in new.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = wide_config.rms_norm_eps
    new.norm.weight[: len(old.norm.weight)] = old.norm.weight * shrink
    num_old, num_new = len(old.layers), len(new.layers)
    sources = {(i + 1) * num_new // num_old - 1: layer for i, layer in enumerate(old.layers)}
    for i, layer in enumerate(new.layers):
        source = sources.get(i)
        for name, wide in layer.named_modules():
            if isinstance(wide, nn.Linear):
                writes = name.endswith(("o_proj", "down_proj"))
                place(wide, source.get_submodule(name) if source is not None else None, writes)
        for name in ("input_layernorm", "post_attention_layernorm"):
            if source is not None:
                narrow = source.get_submodule(name).weight
                layer.get_submodule(name).weight[: len(narrow)] = narrow * shrink


def projector_layers(llava: LlavaForConditionalGeneration) -> list[nn.Linear]:
    return [llava.model.multi_modal_projector.linear_1, llava.model.multi_modal_projector.linear_2]


def place(wide: nn.Linear, narrow: nn.Linear | None, writes: bool) -> None:
    """The narrow layer in a corner of the wide one; the rest reads at random or writes zeros."""
    if writes:
        nn.init.zeros_(wide.weight)
    else:
        nn.init.normal_(wide.weight, std=wide.in_features**-0.5)
    if wide.bias is not None:
        nn.init.zeros_(wide.bias)
    if narrow is None:
        return
    wide.weight[: narrow.out_features, : narrow.in_features] = narrow.weight
    if narrow.bias is not None:
        wide.bias[: narrow.out_features] = narrow.bias
