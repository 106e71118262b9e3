"""The language-only twin -> a LLaVA over the shipped tower, as LLaVA-1.5 is made of a language model: first
its projector alone, then projector and language model together.

Controlled comparisons of perception pretraining need it: the two language models are then one, before and
after it has learned to see, and both have read the same texts.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from repfusion.foundation.perception import (
    FoundationConfig,
    ScenePool,
    frozen_tower_loss,
    llava_config,
    optimise,
    save_mllm,
)
from repfusion.pretrained.weights import load_transformers


def train_fluent(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> None:
    """Writes `llava_fluent`; the tower is the shipped one's, bit for bit."""
    torch.manual_seed(8)
    shipped = load_transformers(LlavaForConditionalGeneration, folder / "llava", "LLaVA")
    twin = load_transformers(LlamaForCausalLM, folder / "language", "language model")
    llava = LlavaForConditionalGeneration(llava_config(config, tokenizer))
    llava.model.vision_tower.load_state_dict(shipped.model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(twin.model.state_dict())
    llava.lm_head.load_state_dict(twin.lm_head.state_dict())
    loss_of = partial(frozen_tower_loss, llava, tokenizer, pool, config.fluent_batch_size)
    projector = list(llava.model.multi_modal_projector.parameters())
    spoken = nn.ModuleList([llava.model.language_model, llava.lm_head]).requires_grad_(False)
    optimise(projector, config, config.fluent_align_steps, loss_of(captions=False), "fluent, projector")
    spoken.requires_grad_(True)
    config = config.model_copy(update={"learning_rate": config.fluent_learning_rate})
    learned = [*projector, *spoken.parameters()]
    optimise(learned, config, config.fluent_steps, loss_of(captions=True), "fluent")
    save_mllm(llava, tokenizer, folder / "llava_fluent")
