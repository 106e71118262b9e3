"""The denoiser: noisy latents, noise level and a condition -> velocity.

RepFusion's interface is token-wise AdaLN-Single (arXiv 2606.14700; AdaLN-Single from PixArt-alpha, arXiv
2310.00426): condition tokens align one to one with latent tokens. Cross-attention is the interface for
conditions of any length. The blocks follow RAE's DiT (arXiv 2510.11690): RMSNorm, SwiGLU, 2-D rotary
positions, zero-initialised gates and output.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.config import Config

Interface = Literal["adaln", "cross_attention"]


class DiTConfig(Config):
    hidden_size: int = 192
    """Width. At least the latent width, or the model cannot fit even one image (RAE, section 4)."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 3
    """Attention heads; the head width must be a multiple of 4 (2-D rotary pairs)."""
    mlp_ratio: float = 4.0
    """Parameters of the SwiGLU layer, counted as a plain MLP of this expansion (its inner width is 2/3 of
    it).
    """
    interface: Interface = "adaln"
    """How the condition enters: per token through AdaLN-Single, or by cross-attention."""
    absolute_positions: bool = True
    """Add fixed sine-cosine positions to the embedded latents, as RAE's DiT does. Rotary positions are
    relative: without these, only a condition that differs from place to place tells where a token stands.
    """


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


def rotary_2d(grid: tuple[int, int], head_dim: int) -> Float[Tensor, "n half 2"]:
    """Cosine and sine per token and rotary pair; the first half of the pairs turns with the row, the second
    with the column.
    """
    quarter = head_dim // 4
    frequencies = 1.0 / 100.0 ** (torch.arange(quarter) / quarter)
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, cols.reshape(-1, 1) * frequencies], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def sin_cos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "n dim"]:
    """Fixed 2-D positions: a quarter of the channels each for sine and cosine of row and column."""
    return rearrange(rotary_2d(grid, dim), "n half two -> n (half two)")


def rotate(x: Float[Tensor, "b h n d"], rotary: Float[Tensor, "n half 2"]) -> Float[Tensor, "b h n d"]:
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary.to(x.dtype).unbind(-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """With its gain cast to the input: under autocast a float32 gain on bfloat16 input would leave the fused
    kernel.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention, normalised queries and keys; over itself, or over a context of `context_dim`."""

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

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rotary: Float[Tensor, "n half 2"] | None = None,
        context: Float[Tensor, "b m c"] | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(
            self.key_value(x if context is None else context),
            "b n (s h d) -> s b h n d",
            s=2,
            h=self.num_heads,
        )
        q, k = self.query_norm(q), self.key_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        attn_mask = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_mask)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner = max(8, round(2 / 3 * mlp_ratio * dim / 8) * 8)
        self.gate_up = nn.Linear(dim, 2 * inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the shared modulation plus the block's table."""

    def __init__(self, config: DiTConfig, condition_dim: int):
        super().__init__()
        dim = config.hidden_size
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.attention_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, config.num_heads)
        self.mlp_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = SwiGLU(dim, config.mlp_ratio)
        if config.interface == "cross_attention":
            self.cross_norm = RMSNorm(dim, eps=1e-6)
            self.cross_attention = Attention(dim, config.num_heads, context_dim=condition_dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "n half 2"],
        context: Float[Tensor, "b m c"] | None,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b n d"]:
        # One sum for each part: as views of one tensor all six would be kept for the backward pass.
        parts = zip(modulation.unbind(2), self.table, strict=True)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part + row for part, row in parts)
        x = x + gate_a * self.attention(self.attention_norm(x) * (1 + scale_a) + shift_a, rotary)
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context=context, mask=mask)
        return x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """Velocity of noisy latents.

    Args:
        config: widths, depth and interface.
        latent_dim: channels of a latent token.
        grid: rows and columns of latent tokens (patch size 1: a DiT token is a latent token).
        condition_dim: width of the condition tokens.

    Raises:
        ValueError: where a width does not divide, or is below the latent width.
    """

    def __init__(self, config: DiTConfig, latent_dim: int, grid: tuple[int, int], condition_dim: int):
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        if dim % heads or (dim // heads) % 4:
            raise ValueError(f"hidden_size {dim} over {heads} heads must give a head width divisible by 4")
        if dim < latent_dim:
            raise ValueError(
                f"hidden_size {dim} is below the latent width {latent_dim}; raise dit.hidden_size to at "
                f"least {latent_dim}"
            )
        self.config = config
        self.embed = nn.Linear(latent_dim, dim)
        self.time = TimestepEmbedder(condition_dim)
        self.modulation = nn.Linear(condition_dim, 6 * dim)
        self.blocks = nn.ModuleList(Block(config, condition_dim) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_table = nn.Parameter(torch.zeros(2, dim))
        self.final_modulation = nn.Linear(condition_dim, 2 * dim)
        self.out = nn.Linear(dim, latent_dim)
        self.register_buffer("rotary", rotary_2d(grid, dim // heads), persistent=False)
        positions = sin_cos_positions(grid, dim) if config.absolute_positions else torch.zeros(1, dim)
        self.register_buffer("positions", positions, persistent=False)
        for layer in (self.modulation, self.final_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        z_t: Float[Tensor, "b n d"],
        t: Float[Tensor, " b"],
        condition: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Velocity (noise - latents) at noise level t. `mask` marks real condition tokens (cross-attention
        only).
        """
        signal = self.time(t)[:, None, :]
        context = condition if self.config.interface == "cross_attention" else None
        signal = F.silu(signal if context is not None else condition + signal)
        modulation = rearrange(self.modulation(signal), "b k (s d) -> b k s d", s=6)
        x = self.embed(z_t) + self.positions
        for block in self.blocks:
            x = block(x, modulation, self.rotary, context, mask)
        shift, scale = (
            rearrange(self.final_modulation(signal), "b k (s d) -> b k s d", s=2) + self.final_table
        ).unbind(2)
        return self.out(self.final_norm(x) * (1 + scale) + shift)
