"""A generator -> FLOPs of training and sampling, parameters and bytes, by part; `python -m repfusion.flops
--checkpoint DIR`.

Counted: every matrix product, 2 FLOPs a multiply-add, and attention's two products over the whole square
(causal or not, as torch's FlopCounterMode counts them). Backward is twice forward, but without what autograd
does not compute: gradients of frozen weights, and of inputs that nothing trained lies before. Not counted:
norms, activations, rotations, token lookups, softmax, the optimizer, a second forward for checkpointed
activations.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfusion.checkpoint import read_config
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.dit import DiT, TimestepEmbedder
from repfusion.foundation import WEIGHTS
from repfusion.meta import load_model_config, meta_decoder, meta_from_config, published
from repfusion.model import Generator
from repfusion.rae.decoder import RAEDecoder, RAEDecoderConfig
from repfusion.sampler import SamplerConfig

Number = int | float

PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00\b.*\bNVL\b", 835e12),
    (r"\bH[18]00\b.*\bPCIe\b", 756e12),
    (r"\b(H100|H200|H800|GH200)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bMI300X\b", 1307e12),
)
"""Dense bfloat16 peak in FLOP/s by a pattern of the GPU's name, from the makers' data sheets; the first match
counts.
"""


def peak_of(name: str) -> float | None:
    """By the name the driver gives a GPU; None where it is not in the table."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name, re.IGNORECASE)), None)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s. None for a CPU or an unknown GPU."""
    device = torch.device(device)
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Cost:
    """FLOPs forward and backward."""

    forward: Number = 0.0
    backward: Number = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> Number:
        return self.forward + self.backward


def linear(layers: nn.Module, tokens: Number, weight_grad: bool = True, input_grad: bool = True) -> Cost:
    """All linear layers in a module, each applied to `tokens` tokens."""
    num_weights = sum(layer.weight.numel() for layer in layers.modules() if isinstance(layer, nn.Linear))
    return Cost(2 * num_weights * tokens, 2 * num_weights * tokens * (weight_grad + input_grad))


def attention(width: int, queries: Number, keys: Number) -> Cost:
    """Scores and weighted values over all heads together; both operands take gradients."""
    forward = 4 * width * queries * keys
    return Cost(forward, 2 * forward)


def embedder_cost(embedder: TimestepEmbedder) -> Cost:
    """One noise level; the sinusoids take no gradient."""
    first, _, second = embedder.mlp
    return linear(first, 1, input_grad=False) + linear(second, 1)


def language_cost(language_model: nn.Module, queries: Number, keys: Number) -> Cost:
    """`queries` tokens that see `keys` tokens, themselves included; frozen, gradients pass through."""
    config: Any = language_model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    cost = linear(language_model, queries, weight_grad=False)
    for _ in range(config.num_hidden_layers):
        cost += attention(width, queries, keys)
    return cost


def dit_cost(dit: DiT, tokens: Number, condition_tokens: Number) -> Cost:
    """The noisy latents take no gradient; the condition does."""
    width, is_cross = dit.config.hidden_size, dit.config.interface == "cross_attention"
    signal_tokens = 1 if is_cross else tokens
    cost = linear(dit.embed, tokens, input_grad=False) + embedder_cost(dit.time) + linear(dit.out, tokens)
    cost += linear(dit.modulation, signal_tokens) + linear(dit.final_modulation, signal_tokens)
    for block in dit.blocks:
        cost += linear(block.attention, tokens) + linear(block.mlp, tokens)
        cost += attention(width, tokens, tokens)
        if is_cross:
            cross = block.cross_attention
            cost += linear(cross.query, tokens) + linear(cross.out, tokens)
            cost += linear(cross.key_value, condition_tokens) + attention(width, tokens, condition_tokens)
    return cost


def decoder_cost(decoder: RAEDecoder) -> Cost:
    rows, cols = decoder.config.grid
    cost = linear(decoder, rows * cols)
    for _ in decoder.blocks:
        cost += attention(decoder.config.hidden_size, rows * cols, rows * cols)
    return cost


def train_costs(
    generator: Generator, num_text_tokens: Number, has_text_features: bool = True
) -> dict[str, Cost]:
    """FLOPs of one training sample by part; frozen parts count forward and activation gradient only.

    Args:
        generator: on any device, meta included.
        num_text_tokens: tokens of a prompt, begin token and padding included; a mean will do.
        has_text_features: for a method whose text features can be computed ahead, that they were.
    """
    tokens = generator.latent_shape[0]
    conditioner, dit = generator.conditioner, generator.dit
    language_model = conditioner.mllm.language_model
    if isinstance(conditioner, NoisyLatentConditioner):
        both = num_text_tokens + tokens
        return {
            "language model": language_cost(language_model, both, both),
            "projector": linear(conditioner.projector, tokens) + embedder_cost(conditioner.time),
            "DiT": dit_cost(dit, tokens, tokens),
        }
    read = Cost() if has_text_features else language_cost(language_model, num_text_tokens, num_text_tokens)
    return {"language model": Cost(read.forward), "DiT": dit_cost(dit, tokens, num_text_tokens)}


def train_flops(generator: Generator, num_text_tokens: Number, has_text_features: bool = True) -> float:
    """FLOPs of one training sample, forward and backward (see `train_costs`)."""
    costs = train_costs(generator, num_text_tokens, has_text_features)
    return float(sum(cost.total for cost in costs.values()))


def sample_costs(
    generator: Generator,
    num_text_tokens: Number,
    config: SamplerConfig = SamplerConfig(),
    decoder: RAEDecoder | None = None,
) -> dict[str, Number]:
    """FLOPs of one image by part: the prompt is read once, the noisy latents at every step, all of it twice
    with guidance (the empty prompt is padded to the other's length).
    """
    tokens, times = generator.latent_shape[0], 2 if config.guidance_scale != 1 else 1
    conditioner = generator.conditioner
    language_model = conditioner.mllm.language_model
    read = language_cost(language_model, num_text_tokens, num_text_tokens).forward
    costs: dict[str, Number] = {"language model, prompt": times * read}
    steps = times * config.num_steps
    if isinstance(conditioner, NoisyLatentConditioner):
        seen = language_cost(language_model, tokens, num_text_tokens + tokens).forward
        projected = linear(conditioner.projector, tokens) + embedder_cost(conditioner.time)
        costs |= {"language model, steps": steps * seen, "projector": steps * projected.forward}
        condition_tokens: Number = tokens
    else:
        condition_tokens = num_text_tokens
    costs["DiT"] = steps * dit_cost(generator.dit, tokens, condition_tokens).forward
    if decoder is not None:
        costs["decoder"] = decoder_cost(decoder).forward
    return costs


def sample_flops(
    generator: Generator,
    num_text_tokens: Number,
    config: SamplerConfig = SamplerConfig(),
    decoder: RAEDecoder | None = None,
) -> float:
    """FLOPs of one image (see `sample_costs`)."""
    return float(sum(sample_costs(generator, num_text_tokens, config, decoder).values()))


@dataclass(frozen=True)
class Size:
    num_parameters: int
    num_trainable: int
    num_bytes: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> "Size":
        found = list(parameters)
        trainable = sum(p.numel() for p in found if p.requires_grad)
        return cls(sum(p.numel() for p in found), trainable, sum(p.numel() * p.element_size() for p in found))


def sizes(generator: Generator, decoder: RAEDecoder | None = None) -> dict[str, Size]:
    """Parameters and bytes as held, by part."""
    conditioner = generator.conditioner
    language_model = conditioner.mllm.language_model
    frozen = {id(p) for p in language_model.parameters()}
    own = [p for p in conditioner.parameters() if id(p) not in frozen]
    found = {
        "language model": Size.of(language_model.parameters()),
        "projector": Size.of(own),
        "DiT": Size.of(generator.dit.parameters()),
    }
    return found if decoder is None else {**found, "decoder": Size.of(decoder.parameters())}


def table(generator: Generator, decoder: RAEDecoder, num_text_tokens: Number, sampler: SamplerConfig) -> str:
    """Parameters, bytes, GFLOPs of a training sample and of an image, by part."""
    training = train_costs(generator, num_text_tokens, has_text_features=False)
    drawing = sample_costs(generator, num_text_tokens, sampler, decoder)
    total = {"parameters": 0, "bytes": 0, "train": 0.0, "image": 0.0}
    rows = [("part", "parameters", "trained", "MB", "train GFLOP", "image GFLOP")]
    for part, size in sizes(generator, decoder).items():
        cost = training.get(part, Cost()).total
        image = sum(value for name, value in drawing.items() if name.split(",")[0] == part)
        held = size.num_bytes / 1e6
        counts = f"{size.num_parameters:,}", f"{size.num_trainable:,}", f"{held:,.1f}"
        rows.append((part, *counts, f"{cost / 1e9:,.3f}", f"{image / 1e9:,.2f}"))
        for name, value in zip(total, (size.num_parameters, size.num_bytes, cost, image), strict=True):
            total[name] += value
    trained = sum(p.numel() for p in generator.trainable_state().values())
    counts = f"{total['parameters']:,}", f"{trained:,}", f"{total['bytes'] / 1e6:,.1f}"
    rows.append(("all", *counts, f"{total['train'] / 1e9:,.3f}", f"{total['image'] / 1e9:,.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.flops", description="Sizes and FLOPs by part.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", type=Path, default=WEIGHTS / "base", help="its config and the folders that it names"
    )
    which.add_argument("--config", type=Path, help="YAML of a training (its `model`) or of a model")
    which.add_argument("--published", action="store_true", help="7B language model, 576 tokens, 1.3B DiT")
    parser.add_argument("--text-tokens", type=float, default=32.0, help="of a prompt, begin token included")
    parser.add_argument("--num-steps", type=int, default=SamplerConfig().num_steps)
    parser.add_argument("--guidance-scale", type=float, default=SamplerConfig().guidance_scale)
    args = parser.parse_args()
    try:
        sampler = SamplerConfig(num_steps=args.num_steps, guidance_scale=args.guidance_scale)
        if args.published:
            generator, decoder = published()
        else:
            config = load_model_config(args.config) if args.config else read_config(args.checkpoint)[0]
            generator = meta_from_config(config)
            saved = RAEDecoderConfig.model_validate_json((config.decoder / "config.json").read_text())
            decoder = meta_decoder(saved)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(generator, decoder, args.text_tokens, sampler))
    guided = "" if sampler.guidance_scale == 1 else ", with guidance"
    print(f"prompts of {args.text_tokens:g} tokens; an image takes {sampler.num_steps} steps{guided}")


if __name__ == "__main__":
    main()
