"""Pixels -> a grid of vectors, and a quantised grid -> pixels: the convolutional halves of the pixel branch
(VQGAN, arXiv 2012.09841), the decoder's norms modulated by the quantised grid (MoVQ, arXiv 2209.09002,
equation 5).
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.config import Config

Multiplier = Annotated[int, Field(ge=1)]


class PixelConfig(Config):
    """The pixel branch."""

    num_codes: int = Field(default=98_304, ge=2)
    """Entries of its codebook."""
    width: int = Field(default=32, ge=1)
    """Channels of a code."""
    dropped_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the samples that training rebuilds from the semantic codes alone."""


class ConvConfig(Config):
    """The convolutional encoder and decoder."""

    channels: int = Field(default=128, ge=1)
    """Channels at the images' own resolution."""
    multipliers: tuple[Multiplier, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    """Channels of each level, as multiples; each level but the last halves the resolution."""
    depth: int = Field(default=2, ge=1)
    """Residual blocks of a level."""

    @property
    def factor(self) -> int:
        """Side in px of the square that a place of the grid stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def levels(self) -> list[int]:
        """Channels of each level, that of the highest resolution first."""
        return [self.channels * one for one in self.multipliers]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift are those that a quantised grid says at each place (MoVQ)."""

    def __init__(self, channels: int, grid_channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.scale_shift = nn.Conv2d(grid_channels, 2 * channels, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], quantised: Float[Tensor, "b q r s"]
    ) -> Float[Tensor, "b c h w"]:
        seen = F.interpolate(self.scale_shift(quantised), x.shape[-2:], mode="nearest")
        scale, shift = seen.chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class PlainNorm(nn.Module):
    """A group norm that is told nothing: the encoder's."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)

    def forward(self, x: Float[Tensor, "b c h w"], quantised: Tensor | None) -> Float[Tensor, "b c h w"]:
        return self.norm(x)


def norm_of(channels: int, grid_channels: int | None) -> nn.Module:
    return PlainNorm(channels) if grid_channels is None else SpatialNorm(channels, grid_channels)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inner: int, channels: int, grid_channels: int | None):
        super().__init__()
        self.first_norm = norm_of(inner, grid_channels)
        self.first = nn.Conv2d(inner, channels, 3, padding=1)
        self.second_norm = norm_of(channels, grid_channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if inner == channels else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], quantised: Tensor | None) -> Float[Tensor, "b d h w"]:
        hidden = self.first(F.silu(self.first_norm(x, quantised)))
        return self.shortcut(x) + self.second(F.silu(self.second_norm(hidden, quantised)))


class PlaneAttention(nn.Module):
    """Every place of a grid sees every other, beside a shortcut; one head, as in VQGAN."""

    def __init__(self, channels: int, grid_channels: int | None):
        super().__init__()
        self.norm = norm_of(channels, grid_channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], quantised: Tensor | None) -> Float[Tensor, "b c h w"]:
        both = self.query_key_value(self.norm(x, quantised))
        q, k, v = rearrange(both, "b (s c) h w -> s b 1 (h w) c", s=3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Level(nn.Module):
    """Residual blocks of one resolution; the lowest has attention after the first of them."""

    def __init__(self, inner: int, channels: int, depth: int, attends: bool, grid_channels: int | None):
        super().__init__()
        blocks: list[nn.Module] = [
            ResidualBlock(channels if number else inner, channels, grid_channels) for number in range(depth)
        ]
        if attends:
            blocks.insert(1, PlaneAttention(channels, grid_channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "b c h w"], quantised: Tensor | None) -> Float[Tensor, "b d h w"]:
        for block in self.blocks:
            x = block(x, quantised)
        return x


class ConvEncoder(nn.Module):
    """Pixels -> a vector of `width` channels for each place of the grid."""

    def __init__(self, config: ConvConfig, width: int):
        super().__init__()
        levels = config.levels
        self.first = nn.Conv2d(3, levels[0], 3, padding=1)
        before = [levels[0], *levels[:-1]]
        self.levels = nn.ModuleList(
            Level(inner, channels, config.depth, number == len(levels) - 1, None)
            for number, (inner, channels) in enumerate(zip(before, levels, strict=True))
        )
        self.downs = nn.ModuleList(nn.Conv2d(one, one, 3, stride=2, padding=1) for one in levels[:-1])
        self.norm = group_norm(levels[-1])
        self.out = nn.Conv2d(levels[-1], width, 1)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Vectors in the order of rows; pixels are in [0, 1]."""
        x = self.first(2 * pixels - 1)
        for number, level in enumerate(self.levels):
            x = level(x, None)
            if number < len(self.downs):
                x = self.downs[number](x)
        return rearrange(self.out(F.silu(self.norm(x))), "b d r c -> b (r c) d")


class ConvDecoder(nn.Module):
    """A quantised grid of `grid_channels` channels -> pixels."""

    def __init__(self, config: ConvConfig, grid_channels: int):
        super().__init__()
        levels = config.levels[::-1]
        self.first = nn.Conv2d(grid_channels, levels[0], 3, padding=1)
        before = [levels[0], *levels[:-1]]
        self.levels = nn.ModuleList(
            Level(inner, channels, config.depth, number == 0, grid_channels)
            for number, (inner, channels) in enumerate(zip(before, levels, strict=True))
        )
        self.ups = nn.ModuleList(nn.Conv2d(one, one, 3, padding=1) for one in levels[:-1])
        self.norm = SpatialNorm(levels[-1], grid_channels)
        self.out = nn.Conv2d(levels[-1], 3, 3, padding=1)
        with torch.no_grad():
            assert self.out.bias is not None
            self.out.bias.fill_(0.5)  # the middle of [0, 1]

    def hidden(self, quantised: Float[Tensor, "b q r s"]) -> Float[Tensor, "b c h w"]:
        """What the last layer reads."""
        x = self.first(quantised)
        for number, level in enumerate(self.levels):
            x = level(x, quantised)
            if number < len(self.ups):
                x = self.ups[number](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.silu(self.norm(x, quantised))
