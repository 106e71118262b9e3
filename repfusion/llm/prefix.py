"""Prompt tokens, then further tokens -> the LLM's last hidden states at those: what every method that reads
the prompt in the LLM shares, in training at once and in sampling after keys and values computed once.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repfusion.llm.mllm import MLLM


@dataclass(frozen=True)
class Prefix:
    """Prompt ids `[b, m]`, left-padded, their mask, and, for sampling, the keys and values over them."""

    ids: Int[Tensor, "b m"]
    mask: Bool[Tensor, "b m"]
    cache: Any = None
    """A transformers Cache."""

    def first(self, num: int) -> "Prefix":
        """Of the first `num` prompts."""
        cache = self.cache
        if cache is not None:
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            cache.batch_select_indices(slice(num))  # views
        return Prefix(self.ids[:num], self.mask[:num], cache)


def leave_room(mllm: MLLM, num_tokens: int) -> None:
    """From now on the MLLM takes prompts that leave room for `num_tokens` in its context.

    Raises:
        ValueError: where there is no room for a prompt beside them.
    """
    context = mllm.language_model.config.max_position_embeddings
    mllm.max_text_tokens = min(mllm.max_text_tokens, context - num_tokens)
    if mllm.max_text_tokens < 1:
        raise ValueError(
            f"MLLM {mllm.folder}: its context of {context} leaves no room for a prompt beside {num_tokens} "
            "latent tokens or queries"
        )


def read_prompts(mllm: MLLM, prompts: list[str], device: torch.device, reuse: bool = False) -> Prefix:
    """With `reuse`, the LLM reads the prompts once and keeps them for every step (no gradients)."""
    ids, mask = mllm.tokenize(prompts)
    ids, mask = ids.to(device), mask.to(device)
    if not reuse:
        return Prefix(ids, mask)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = mllm.language_model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True
        ).past_key_values
    return Prefix(ids, mask, cache)


def read_on(
    mllm: MLLM, prefix: Prefix, tokens: Float[Tensor, "b n c"], bidirectional: bool = False
) -> Float[Tensor, "b n c"]:
    """The last hidden states of `tokens` after the prompts. `bidirectional` lets them all see each other;
    otherwise they are causal, as the prompts always are.
    """
    tokens = tokens.to(mllm.language_model.dtype)
    read = _read_whole if prefix.cache is None else _read_cached
    return read(mllm.language_model, prefix, tokens, bidirectional)


def _read_cached(model: Any, prefix: Prefix, tokens: Tensor, bidirectional: bool) -> Tensor:
    """After the prompts that the cache remembers."""
    num_text = prefix.ids.shape[1]
    mask = torch.cat([prefix.mask, prefix.mask.new_ones(tokens.shape[:2])], dim=1)
    if (surplus := prefix.cache.get_seq_length() - num_text) > 0:
        prefix.cache.crop(-surplus)  # forget the previous step's tokens
    seen = mask[:, None, None].expand(-1, 1, tokens.shape[1], -1) if bidirectional else mask.long()
    return model(
        inputs_embeds=tokens,
        attention_mask=seen,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, num_text:],
        past_key_values=prefix.cache,
        use_cache=True,
    ).last_hidden_state


def _read_whole(model: Any, prefix: Prefix, tokens: Tensor, bidirectional: bool) -> Tensor:
    """Prompts and tokens at once, each row rolled until its padding lies at the end, where no token that
    counts looks: the causal LLM takes no mask, so flash attention serves, and no position ids, so nothing
    waits for the GPU to tell what they say.
    """
    rows = torch.cat([model.get_input_embeddings()(prefix.ids), tokens.to(model.dtype)], dim=1)
    length, num_text = rows.shape[1], prefix.ids.shape[1]
    padding = (~prefix.mask).sum(1, keepdim=True)
    order = torch.arange(length, device=rows.device) + padding
    rows = take(rows, order % length)
    mask = None
    if bidirectional:
        mask = see_each_other(num_text - padding, tokens.shape[1], length)
    hidden = model(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
    return take(hidden, torch.arange(num_text, length, device=rows.device) - padding)


def see_each_other(first: Int[Tensor, "b 1"], num: int, length: int) -> Bool[Tensor, "b 1 l l"]:
    """Which token (row) sees which (column): causal, but the `num` tokens from `first` on see each other."""
    places = torch.arange(length, device=first.device)
    inside = (places >= first) & (places < first + num)
    return ((places[:, None] >= places) | (inside[:, :, None] & inside[:, None, :]))[:, None]


def take(rows: Float[Tensor, "b n c"], positions: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    """Of each row the tokens at its own positions."""
    return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))
