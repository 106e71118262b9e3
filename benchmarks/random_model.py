"""A model of any geometry with random weights, and batches and captions for it: no file is read."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from repfusion.data.batches import Batch
from repfusion.diffusion.flow import DROPPED, draw, uniforms
from repfusion.inputs import Inputs, pin
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.layers import rotary_grid, sin_cos_positions
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.meta import BareTokenizer, meta_model
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Branch, Request

CONDITION_DROPOUT = 0.1
NUM_BATCHES = 8
"""Different batches, made ahead as the loader's thread would, then repeated."""


class NumberTokenizer(BareTokenizer):
    """A prompt is a line of token ids."""

    def __call__(self, prompts: list[str], **options: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[int(word) for word in prompt.split()] for prompt in prompts])


def llava_of(
    name: str, text: dict[str, int], dit: DiTConfig, grid: int, latent_dim: int, mllm_dtype: str = "float32"
) -> TextToImage:
    """The published model's classes at any size, over grid x grid latent tokens; no memory. `text` are fields
    of LlamaConfig.
    """
    from transformers import LlamaConfig

    folder = Path(name)  # is not read
    config = ModelConfig.model_validate(
        {"mllm": folder, "mllm_dtype": mllm_dtype, "encoder": EncoderConfig(path=folder), "dit": dit}
    )
    return meta_model(config, LlamaConfig(**text), (grid, grid), latent_dim)


def small() -> TextToImage:
    """At a width that a CPU trains in a moment."""
    text = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    dit = DiTConfig(hidden_size=64, depth=2, num_heads=4)
    return llava_of("small", text, dit, grid=4, latent_dim=32, mllm_dtype="bfloat16")


@torch.no_grad()
def fill(model: TextToImage, device: torch.device) -> TextToImage:
    """Random weights on the device for a model without memory; products with zeros would be faster."""
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    llm, dit = model.conditioner.llm, model.denoiser
    # what to_empty lost: buffers that are no weights, and the statistics
    dit.positions = sin_cos_positions(model.grid, dit.config.hidden_size).to(device)
    dit.rotary = rotary_grid(model.grid, dit.config.hidden_size // dit.config.num_heads).to(device)
    rotary = llm.language_model.rotary_emb
    llm.language_model.rotary_emb = type(rotary)(rotary.config).to(device)
    mean = torch.zeros(model.latent_shape, dtype=torch.float64)
    model.statistics = LatentStatistics(1, mean, torch.ones_like(mean))
    llm.tokenizer = NumberTokenizer(llm.tokenizer.model_max_length)
    return model


def captions(num: int, num_tokens: int, vocab_size: int, rng: np.random.Generator) -> list[str]:
    """Lines of 3/4 to 5/4 of `num_tokens` token ids, the begin token included."""
    lengths = rng.integers(num_tokens * 3 // 4, num_tokens * 5 // 4 + 1, num) - 1
    return [" ".join(map(str, rng.integers(3, vocab_size, length))) for length in lengths]


def make_batches(model: TextToImage, micro_batch: int, num_tokens: int) -> Iterator[Batch]:
    """Batches as the loader makes them: float16 features, page-locked where there is a GPU."""
    rng = np.random.default_rng(0)
    vocab_size = model.conditioner.llm.language_model.config.vocab_size
    made = []
    for first in range(0, NUM_BATCHES * micro_batch, micro_batch):
        positions = list(range(first, first + micro_batch))
        keys = [f"{position:09d}" for position in positions]
        texts = captions(micro_batch, num_tokens, vocab_size, rng)
        inputs = pin(inputs_of(model, texts, positions))
        made.append(Batch(positions, keys, ["main"] * micro_batch, [0] * micro_batch, inputs))
    return cycle(made)


def inputs_of(model: TextToImage, texts: list[str], seeds: list[int]) -> Inputs:
    """What the model's `collate` makes of samples with these captions and random features."""
    dropped = (uniforms(seeds)[:, DROPPED] < CONDITION_DROPOUT).tolist()
    branches: list[Branch] = ["none" if one else "full" for one in dropped]
    t, noise = draw(seeds, model.latent_shape, model.shift)
    return {
        "request": model.conditioner.collate([Request(text) for text in texts], branches, seeds),
        "features": torch.randn(noise.shape).half(),
        "t": t,
        "noise": noise,
    }
