"""Features of a frozen vision tower -> codes -> the features again: the branch that says what an image shows
(ILLUME+, arXiv 2504.01934, section 3.1).
"""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.codes.quantise import SimVQ
from repfusion.config import Config
from repfusion.layers import EncoderBlock, RMSNorm, rotary_grid


class SemanticConfig(Config):
    """The semantic branch."""

    num_codes: int = Field(default=32_768, ge=2)
    """Entries of its codebook."""
    width: int = Field(default=32, ge=1)
    """Channels of a code."""
    hidden_size: int = Field(default=768, ge=4)
    """Width of the blocks that make features of codes again."""
    depth: int = Field(default=4, ge=1)
    """How many of them there are."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads."""


class SemanticBranch(nn.Module):
    """One code for each token of `feature_dim` channels on `grid`."""

    def __init__(self, config: SemanticConfig, feature_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.down = nn.Linear(feature_dim, config.width)
        self.quantiser = SimVQ(config.num_codes, config.width)
        self.up = nn.Linear(config.width, config.hidden_size)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.hidden_size, config.num_heads) for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.out = nn.Linear(config.hidden_size, feature_dim)
        rotary = rotary_grid(grid, config.hidden_size // config.num_heads)
        self.register_buffer("rotary", rotary, persistent=False)

    def rebuilt(self, codes: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        """Features, of the codes' vectors."""
        x = self.up(codes)
        for block in self.blocks:
            x = block(x, rotary=self.rotary)
        return self.out(self.norm(x))

    def distance(self, codes: Float[Tensor, "b n d"], features: Float[Tensor, "b n c"]) -> Float[Tensor, ""]:
        """One minus the cosine of rebuilt and true features, a mean over all tokens."""
        return 1 - F.cosine_similarity(self.rebuilt(codes).float(), features, dim=-1).mean()
