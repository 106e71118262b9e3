"""Layers written out token by token and head by head, as slow references."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from repfusion.layers import Attention, EncoderBlock, SwiGLU
from repfusion.model.blocks.adaln import AdaLNBlock

Pair = tuple[Tensor, Tensor]


def rms(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


Place = tuple[int, int] | int
"""Row and column of a token, or its number in a row."""


def angle(place: Place, pair: int, num_pairs: int) -> float:
    """By how much a rotary pair turns: half of the pairs with the row, the other half with the column; of
    tokens in a row all with the number.
    """
    if isinstance(place, int):
        return place * 10_000.0 ** -(pair / num_pairs)
    half = num_pairs // 2
    return place[pair >= half] * 100.0 ** -(pair % half / half)


def turned(x: Tensor, place: Place) -> Tensor:
    """Channels i and i + half of a head turn together."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        by = torch.tensor(angle(place, i, half), dtype=x.dtype)
        out[i] = x[i] * by.cos() - x[i + half] * by.sin()
        out[i + half] = x[i] * by.sin() + x[i + half] * by.cos()
    return out


def split(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.reshape(heads, -1))


def keys_values(projected: Tensor, gain: Tensor, heads: int, place: Place | None) -> list[Pair]:
    """A token's key and value in every head."""
    keys, values = projected.chunk(2)
    found = [rms(key, gain) for key in split(keys, heads)]
    return list(
        zip(
            [key if place is None else turned(key, place) for key in found], split(values, heads), strict=True
        )
    )


def attended(
    attention: Attention,
    tokens: Sequence[Tensor],
    places: Sequence[Place] | None = None,
    beside: Sequence[list[Pair]] = (),
) -> list[Tensor]:
    """What each token finds in all tokens, and in keys and values of others `beside` them."""
    heads = attention.num_heads
    where = [None] * len(tokens) if places is None else places
    projected = [attention.key_value.weight @ token for token in tokens]
    known = [
        keys_values(one, attention.key_norm.weight, heads, at)
        for one, at in zip(projected, where, strict=True)
    ]
    known += beside
    found = []
    for token, place in zip(tokens, where, strict=True):
        mixed = []
        for head, query in enumerate(split(attention.query.weight @ token, heads)):
            query = rms(query, attention.query_norm.weight)
            query = query if place is None else turned(query, place)
            scores = torch.stack([query @ one[head][0] for one in known]) / len(query) ** 0.5
            mixed.append(sum(w * one[head][1] for w, one in zip(scores.softmax(0), known, strict=True)))
        found.append(attention.out.weight @ torch.cat(mixed) + attention.out.bias)
    return found


def fed(mlp: SwiGLU, x: Tensor) -> Tensor:
    gate, up = (mlp.gate_up.weight @ x + mlp.gate_up.bias).chunk(2)
    return mlp.down.weight @ (F.silu(gate) * up) + mlp.down.bias


def attend(block: EncoderBlock, tokens: list[Tensor], places: Sequence[Place] | None = None) -> list[Tensor]:
    """An encoder block over tokens one by one."""
    found = attended(block.attention, [rms(x, block.attention_norm.weight) for x in tokens], places)
    tokens = [x + y for x, y in zip(tokens, found, strict=True)]
    return [x + fed(block.mlp, rms(x, block.mlp_norm.weight)) for x in tokens]


def modulated(
    block: AdaLNBlock,
    tokens: list[Tensor],
    modulation: Tensor,
    places: Sequence[tuple[int, int]],
    beside: Sequence[list[Pair]] = (),
) -> list[Tensor]:
    """An AdaLN block over tokens one by one, under one modulation [6, d] for all."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation + block.table
    found = attended(block.attention, [rms(x) * (1 + scale_a) + shift_a for x in tokens], places, beside)
    tokens = [x + gate_a * y for x, y in zip(tokens, found, strict=True)]
    return [x + gate_m * fed(block.mlp, rms(x) * (1 + scale_m) + shift_m) for x in tokens]
