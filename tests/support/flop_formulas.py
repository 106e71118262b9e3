"""FLOPs of a training sample and of an image by formulas that know every method: what the library's counts
have to equal.

Counted: every matrix product, 2 FLOPs a multiply-add, and attention's two products over the whole square
(causal or not, as torch's FlopCounterMode counts them). Backward is twice forward, but without what autograd
does not compute: gradients of frozen weights, and of inputs that nothing trained lies before. Not counted:
norms, activations, rotations, token lookups, softmax, the optimizer, a second forward for checkpointed
activations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repfusion.conditioning.captioning import CaptioningConfig
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.conditioning.queries import QueriesConditioner
from repfusion.diffusion.sampler import SamplerConfig, num_evaluations
from repfusion.flops.count import CONDITIONER, DECODER, DENOISER, LLM
from repfusion.flops.counter import Cost, Number
from repfusion.latents.load import Decoder
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.layers import TimestepEmbedder
from repfusion.model.blocks.cross_attention import CrossAttentionBlock
from repfusion.model.dit import DiT
from repfusion.model.text_to_image import TextToImage


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


def language_cost(
    language_model: nn.Module, queries: Number, keys: Number, halve_causal: bool = False
) -> Cost:
    """`queries` tokens that see `keys` tokens, themselves included. Gradients pass through, and reach the
    weights where they are trained.

    Args:
        language_model: transformers' model, without its head.
        queries: tokens that pass.
        keys: tokens that the last of them sees.
        halve_causal: count only the scores that a causal mask leaves.
    """
    config: Any = language_model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    is_trained = any(parameter.requires_grad for parameter in language_model.parameters())
    seen = keys - (queries - 1) / 2 if halve_causal else keys
    cost = linear(language_model, queries, weight_grad=is_trained)
    return cost + config.num_hidden_layers * attention(width, queries, seen)


def dit_cost(dit: DiT, tokens: Number, condition_tokens: Number) -> Cost:
    """The noisy latents take no gradient; the condition does."""
    width, is_cross = dit.config.hidden_size, isinstance(dit.blocks[0], CrossAttentionBlock)
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


def denoiser_cost(model: TextToImage, num_text_tokens: Number) -> Cost:
    """The DiT over its latents and their condition, or Transfusion's linear head."""
    tokens, conditioner = model.latent_shape[0], model.conditioner
    if not isinstance(model.denoiser, DiT):
        return linear(model.denoiser, tokens)
    match conditioner:
        case NoisyLatentConditioner():
            condition_tokens: Number = tokens
        case QueriesConditioner():
            condition_tokens = len(conditioner.queries)
        case _:
            condition_tokens = num_text_tokens
    return dit_cost(model.denoiser, tokens, condition_tokens)


def kept_cost(model: TextToImage, num_text_tokens: Number) -> Cost:
    """Keys and values of a context that no step changes, which sampling computes once."""
    dit, conditioner = model.denoiser, model.conditioner
    if not isinstance(dit, DiT) or not isinstance(dit.blocks[0], CrossAttentionBlock):
        return Cost()
    if isinstance(conditioner, NoisyLatentConditioner) or getattr(conditioner, "time", None) is not None:
        return Cost()
    is_queries = isinstance(conditioner, QueriesConditioner)
    tokens = len(conditioner.queries) if is_queries else num_text_tokens
    layers = nn.ModuleList(block.cross_attention.key_value for block in dit.blocks)
    return linear(layers, tokens)


def queries_cost(conditioner: QueriesConditioner) -> Cost:
    """Of what lies around the language model: connector and embedder of the noise level."""
    num, cost = len(conditioner.queries), Cost()
    if conditioner.time is not None:
        cost += embedder_cost(conditioner.time)
    if conditioner.connector is not None:
        depth = len(conditioner.connector) - 1
        cost += linear(conditioner.connector, num) + depth * attention(conditioner.llm.width, num, num)
    return cost


def projector_cost(conditioner: NoisyLatentConditioner, tokens: Number) -> Cost:
    return linear(conditioner.projector, tokens) + embedder_cost(conditioner.time)


def decoder_cost(decoder: Decoder) -> Cost:
    """A VAE's, which has to lie on the meta device, is counted by torch."""
    rows, cols = decoder.grid
    if not isinstance(decoder, RAEDecoder):
        features = torch.empty(1, rows * cols, decoder.feature_dim, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(features)
        return Cost(counter.get_total_flops())
    cost = linear(decoder, rows * cols)
    return cost + len(decoder.blocks) * attention(decoder.config.hidden_size, rows * cols, rows * cols)


def captioning_costs(
    conditioner: NoisyLatentConditioner, tokens: int, num_caption_tokens: Number
) -> dict[str, Cost]:
    """One captioned sample: begin token, latents and caption, whose last token but the end is not read; the
    head at each token of the caption and the end.
    """
    length, mllm = tokens + num_caption_tokens, conditioner.llm
    assert mllm.head is not None
    read = language_cost(mllm.language_model, length, length) + linear(mllm.head, num_caption_tokens)
    return {LLM: read, CONDITIONER: projector_cost(conditioner, tokens)}


def train_costs(
    model: TextToImage,
    num_text_tokens: Number,
    has_text_features: bool = True,
    num_caption_tokens: Number | None = None,
) -> dict[str, Cost]:
    """FLOPs of one training sample by part; frozen parts count forward and activation gradient only. With a
    caption loss, of the mean sample: it adds the share of the samples that are captioned.

    Args:
        model: on any device, meta included.
        num_text_tokens: tokens of a prompt, begin token and padding included; a mean will do.
        has_text_features: for a method whose text features can be computed ahead, that they were.
        num_caption_tokens: of a caption to be said, its end token included; None is as many as of a prompt
            (which, on the average, is shorter by the dropped ones).
    """
    tokens = model.latent_shape[0]
    conditioner = model.conditioner
    mllm = conditioner.llm
    read, own = Cost(), Cost()
    match conditioner:
        case NoisyLatentConditioner():
            both = num_text_tokens + tokens
            read, own = language_cost(mllm.language_model, both, both), projector_cost(conditioner, tokens)
        case QueriesConditioner():
            both = num_text_tokens + len(conditioner.queries)
            read, own = language_cost(mllm.language_model, both, both), queries_cost(conditioner)
        case _ if not has_text_features:
            read = Cost(language_cost(mllm.language_model, num_text_tokens, num_text_tokens).forward)
    costs = {LLM: read, CONDITIONER: own, DENOISER: denoiser_cost(model, num_text_tokens)}
    captioning: CaptioningConfig | None = model.config.captioning
    if captioning is not None:
        assert isinstance(conditioner, NoisyLatentConditioner)
        said = num_text_tokens if num_caption_tokens is None else num_caption_tokens
        for part, cost in captioning_costs(conditioner, tokens, said).items():
            costs[part] += captioning.share * cost
    return costs


@dataclass(frozen=True)
class RowCosts:
    """FLOPs of one row (a prompt with its noisy latents) in sampling, by part."""

    once: dict[str, Number]
    """When the prompt is read."""
    each: dict[str, Number]
    """Each time the velocity is evaluated."""


def row_costs(
    model: TextToImage, num_text_tokens: Number, halve_causal: bool = False, rereads_prompt: bool = False
) -> RowCosts:
    """What sampling does once a prompt, and what at every evaluation.

    Args:
        model: on any device, meta included.
        num_text_tokens: of the prompt, begin token included.
        halve_causal: count only the scores of the language model that a causal mask leaves.
        rereads_prompt: count as if no keys and values of the prompt were kept between evaluations.
    """
    tokens, conditioner, text = model.latent_shape[0], model.conditioner, num_text_tokens
    language_model = conditioner.llm.language_model
    is_causal = halve_causal and not getattr(conditioner, "bidirectional", False)
    prompt = language_cost(language_model, text, text, halve_causal).forward
    once: dict[str, Number] = {LLM: 0 if rereads_prompt else prompt}
    each: dict[str, Number] = {LLM: prompt if rereads_prompt else 0}
    match conditioner:
        case NoisyLatentConditioner():
            each[LLM] += language_cost(language_model, tokens, text + tokens, is_causal).forward
            each[CONDITIONER] = projector_cost(conditioner, tokens).forward
        case QueriesConditioner():
            num = len(conditioner.queries)
            when = once if conditioner.time is None else each
            when[LLM] += language_cost(language_model, num, text + num, is_causal).forward
            when[CONDITIONER] = queries_cost(conditioner).forward
    kept = kept_cost(model, text).forward
    once[DENOISER], each[DENOISER] = kept, denoiser_cost(model, text).forward - kept
    return RowCosts(once, each)


def sample_costs(
    model: TextToImage,
    num_text_tokens: Number,
    config: SamplerConfig = SamplerConfig(),
    decoder: Decoder | None = None,
) -> dict[str, Number]:
    """FLOPs of one image by part. With guidance the empty prompt is a row of its own, padded to the other's
    length.
    """
    guided, unguided = num_evaluations(config, model.shift)
    row = row_costs(model, num_text_tokens)
    num_prompts, num_evaluated = (2 if guided else 1), 2 * guided + unguided
    costs = {
        part: num_prompts * row.once.get(part, 0) + num_evaluated * row.each.get(part, 0)
        for part in (LLM, CONDITIONER, DENOISER)
    }
    return costs if decoder is None else {**costs, DECODER: decoder_cost(decoder).forward}
