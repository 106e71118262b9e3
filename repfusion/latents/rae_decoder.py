"""Features -> pixels: a MAE-style ViT with fixed sine-cosine positions and a linear head (RAE, section 3;
MAE, arXiv 2111.06377).
"""

import json
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.layers import Attention, RMSNorm, SwiGLU, rotary_2d, sin_cos_positions


class RAEDecoderConfig(Config):
    feature_dim: int
    """Channels of a feature token."""
    grid: tuple[int, int]
    """Rows and columns of feature tokens."""
    patch_size: int
    """Side in pixels of the patch each token decodes to."""
    hidden_size: int = 128
    """Width."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 2
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
            "rotary", rotary_2d(config.grid, config.hidden_size // config.num_heads), persistent=False
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid

    @property
    def feature_dim(self) -> int:
        return self.config.feature_dim

    def forward(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped."""
        x = self.embed(features) + self.positions
        for block in self.blocks:
            x = block(x, self.rotary)
        rows, cols = self.config.grid
        patches = self.out(self.norm(x))
        return rearrange(
            patches,
            "b (r c) (p q k) -> b k (r p) (c q)",
            r=rows,
            c=cols,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")
        save_file(
            {k: v.to(dtype).contiguous() for k, v in self.state_dict().items()},
            str(Path(folder) / "model.safetensors"),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RAEDecoder":
        """Loads strictly, in float32, frozen and in eval mode.

        Raises:
            ValueError: where the folder lacks a file or the weights do not fit the config.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"decoder folder {folder}: no {name}; expected a folder written by "
                    "RAEDecoder.save_pretrained"
                )
        decoder = cls(RAEDecoderConfig(**json.loads((folder / "config.json").read_text())))
        try:
            decoder.load_state_dict(load_file(str(folder / "model.safetensors")), strict=True)
        except RuntimeError as error:
            raise ValueError(f"decoder folder {folder}: weights do not fit config.json: {error}") from error
        return decoder.float().eval().requires_grad_(False)
