"""Layers that denoisers and conditioners share: attention, SwiGLU, RMSNorm, positions, embedded noise
levels.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Grid = tuple[int, int] | tuple[int, int, int]
"""Rows and columns of tokens; of clips frames before them."""


def timestep_embedding(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """Sinusoidal embedding of noise levels in [0, 1] (scaled by 1000, as in DiT), float32."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = 1000.0 * t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """Noise level -> vector, by sinusoids and a two-layer MLP. `zero_init` makes the initial output zero."""

    def __init__(self, out_dim: int, frequency_dim: int = 256, zero_init: bool = False):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))
        if zero_init:
            nn.init.zeros_(self.mlp[2].weight)
            nn.init.zeros_(self.mlp[2].bias)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.mlp(timestep_embedding(t, self.frequency_dim))


def rotary_grid(grid: Grid, head_dim: int) -> Float[Tensor, "n half 2"]:
    """Cosine and sine per token and rotary pair of all tokens of a grid, in its order."""
    places = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return rotary_at(torch.stack(places, dim=-1).flatten(0, -2), head_dim)


def rotary_at(places: Int[Tensor, "*b n a"], head_dim: int) -> Float[Tensor, "*b n half 2"]:
    """Cosine and sine per token and rotary pair, for tokens at any places. Of two axes each turns half of the
    pairs, the row the first one; of three each a third, the frame the first one and what is left over, as in
    Wan (arXiv 2503.20314).
    """
    pairs, num_axes = head_dim // 2, places.shape[-1]
    later = pairs // num_axes
    first = pairs - (num_axes - 1) * later if num_axes > 2 else later
    angles = []
    for axis, width in enumerate([first, *[later] * (num_axes - 1)]):
        frequencies = 1.0 / 100.0 ** (torch.arange(width, device=places.device) / width)
        angles.append(places[..., axis, None] * frequencies)
    joined = torch.cat(angles, dim=-1)
    return torch.stack([joined.cos(), joined.sin()], dim=-1)


def rotary_1d(num: int, head_dim: int, base: float = 10_000.0) -> Float[Tensor, "n half 2"]:
    """Cosine and sine per token and rotary pair, for `num` tokens in a row (RoFormer, arXiv 2104.09864)."""
    half = head_dim // 2
    angles = torch.arange(num)[:, None] * base ** (-torch.arange(half) / half)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def sin_cos_positions(grid: Grid, dim: int) -> Float[Tensor, "n dim"]:
    """Fixed positions: sines and cosines, half of the channels each, of which each axis has its share (see
    `rotary_at`).
    """
    return rearrange(rotary_grid(grid, dim), "n half two -> n (half two)")


def rotate(x: Float[Tensor, "b h n d"], rotary: Float[Tensor, "*r n half 2"]) -> Float[Tensor, "b h n d"]:
    """Keys or queries of every head turned to their tokens' places: those of all rows, or a row's own."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary.to(x.dtype).unsqueeze(-4).unbind(-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """RMS norm whose gain is cast to the input's dtype: under autocast a float32 gain on bfloat16 input would
    leave the fused kernel.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys: self-attention, or over a context of
    `context_dim` channels.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.is_cross = context_dim is not None
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.query_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.key_norm = RMSNorm(dim // num_heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)
        if self.is_cross:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def keys_values(
        self, context: Float[Tensor, "b m c"]
    ) -> tuple[Float[Tensor, "b h m e"], Float[Tensor, "b h m e"]]:
        """Normalised keys, and values, of every head: what attending to a context needs of it."""
        k, v = rearrange(self.key_value(context), "b m (s h e) -> s b h m e", s=2, h=self.num_heads)
        return self.key_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rotary: Float[Tensor, "*r n half 2"] | None = None,
        attended: tuple[Float[Tensor, "b h m e"], Float[Tensor, "b h m e"]] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`attended` are the `keys_values` of a context, at their places already, whose real tokens `mask`
        marks; None attends to `x`. `rotary` gives the tokens of `x` theirs.
        """
        q = self.query_norm(rearrange(self.query(x), "b n (h e) -> b h n e", h=self.num_heads))
        k, v = self.keys_values(x) if attended is None else attended
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary) if attended is None else k
        attn_mask = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_mask)
        return self.out(rearrange(mixed, "b h n e -> b n (h e)"))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner = max(8, round(2 / 3 * mlp_ratio * dim / 8) * 8)
        self.gate_up = nn.Linear(dim, 2 * inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block in which every token sees every real one. It knows no positions but those
    that it is told.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
        rotary: Float[Tensor, "m half 2"] | None = None,
    ) -> Float[Tensor, "b m c"]:
        x = x + self.attention(self.attention_norm(x), rotary, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class ModulatedBlock(nn.Module):
    """Self-attention and MLP under AdaLN-Single (PixArt-alpha, arXiv 2310.00426): each is shifted, scaled and
    gated by the modulation that all blocks share, plus the block's own table.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.attention_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def modulated(self, modulation: Float[Tensor, "b k 6 d"]) -> list[Float[Tensor, "b k d"]]:
        """Shift, scale and gate of attention, then of the MLP: shared ones and the block's table."""
        # One sum for each part: as views of one tensor all six would be kept for the backward pass.
        return [part + row for part, row in zip(modulation.unbind(2), self.table, strict=True)]

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "*r n half 2"],
    ) -> Float[Tensor, "b n d"]:
        """The block's output for modulations of k = n tokens, or of k = 1 for all of them."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulated(modulation)
        x = x + gate_a * self.attention(self.attention_norm(x) * (1 + scale_a) + shift_a, rotary)
        return x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m)
