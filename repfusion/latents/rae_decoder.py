"""Features -> pixels: a MAE-style ViT with fixed sine-cosine positions and a linear head (RAE, section 3;
MAE, arXiv 2111.06377).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.latents.saved import read_decoder, save_decoder
from repfusion.layers import Attention, RMSNorm, SwiGLU, rotary_grid, sin_cos_positions


class RAEDecoderConfig(Config):
    feature_dim: int = Field(ge=1)
    """Channels of a feature token."""
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Rows and columns of feature tokens."""
    patch_size: int = Field(ge=1)
    """Side in pixels of the patch each token decodes to."""
    hidden_size: int = Field(default=128, ge=1)
    """Width."""
    depth: int = Field(default=4, ge=1)
    """Number of blocks."""
    num_heads: int = Field(default=2, ge=1)
    """Attention heads."""


class DecoderBlock(nn.Module):
    def __init__(self, config: RAEDecoderConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = SwiGLU(config.hidden_size, mlp_ratio=4.0)

    def forward(self, x: Float[Tensor, "b n d"], rotary: Float[Tensor, "n half 2"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class RAEDecoder(nn.Module):
    def __init__(self, config: RAEDecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.feature_dim, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.out = nn.Linear(config.hidden_size, config.patch_size**2 * 3)
        self.register_buffer(
            "positions", sin_cos_positions(config.grid, config.hidden_size), persistent=False
        )
        self.register_buffer(
            "rotary", rotary_grid(config.grid, config.hidden_size // config.num_heads), persistent=False
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def feature_dim(self) -> int:
        return self.config.feature_dim

    @property
    def image_size(self) -> int:
        """Side in px of the images it makes."""
        return self.config.grid[0] * self.config.patch_size

    def forward(
        self, features: Float[Tensor, "b n d"], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped. It draws nothing: `seeds` are not read."""
        return self.to_pixels(self.hidden(features))

    def hidden(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        """What the last layer reads."""
        x = self.embed(features) + self.positions
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.norm(x)

    def to_pixels(self, hidden: Float[Tensor, "b n c"]) -> Float[Tensor, "b 3 h w"]:
        """The last layer's patches, put together."""
        rows, cols = self.config.grid
        return rearrange(
            self.out(hidden),
            "b (r c) (p q k) -> b k (r p) (c q)",
            r=rows,
            c=cols,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        save_decoder(self, self.config, folder, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, on_meta: bool = False) -> "RAEDecoder":
        """Loads strictly, in float32, frozen and in eval mode.

        Args:
            folder: as written by `save_pretrained`.
            on_meta: shapes without memory: of the weights the headers alone are read.

        Raises: ValueError: where the folder lacks a file, or weights are missing, left over, of another shape
            or not finite.
        """
        return read_decoder(cls, RAEDecoderConfig, folder, on_meta)
