"""`llava_fluent` -> a larger one over the same frozen tower, so both read and speak of one latent space.

It starts as the small one, grown to its size so that it says exactly the same (after Net2Net, arXiv
1511.05641; here new channels, heads, units and layers read at random and write zeros), and goes on with the
same dialogues and captions.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from repfusion.foundation.perception import (
    FoundationConfig,
    ScenePool,
    frozen_tower_loss,
    llava_config,
    optimise,
    save_mllm,
)
from repfusion.pretrained.weights import load_transformers


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


def train_large(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> None:
    """Writes `llava_large`; the tower is the small one's, bit for bit."""
    torch.manual_seed(6)
    small = load_transformers(LlavaForConditionalGeneration, folder / "llava_fluent", "LLaVA")
    size = {"text_width": config.large_width, "text_layers": config.large_layers}
    large = LlavaForConditionalGeneration(llava_config(config.model_copy(update=size), tokenizer))
    grow(small, large)
    loss = frozen_tower_loss(large, tokenizer, pool, config.large_batch_size, captions=True)
    learned = [parameter for parameter in large.parameters() if parameter.requires_grad]
    config = config.model_copy(update={"learning_rate": config.large_learning_rate})
    optimise(learned, config, config.large_steps, loss, "large")
    save_mllm(large, tokenizer, folder / "llava_large")
