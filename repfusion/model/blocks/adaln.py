"""Self-attention and MLP under AdaLN-Single (PixArt-alpha, arXiv 2310.00426), one modulation a token or one
for all (RepFusion, arXiv 2606.14700).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.layers import Attention, SwiGLU

Attended = tuple[Tensor, Tensor, Bool[Tensor, "b m"] | None]
"""Keys and values [b h m e] of a context in one block, and the mask of its real tokens."""


class AdaLNBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the shared modulation plus the block's table."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.attention_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = SwiGLU(dim, mlp_ratio)

    def keys_values(self, number: int, tokens: Float[Tensor, "b m c"]) -> tuple[Tensor, Tensor]:
        """Keys and values [b h m e] of the tokens of context `number`; a block without contexts has none."""
        raise NotImplementedError

    def mix(
        self,
        x: Float[Tensor, "b n d"],
        rotary: Float[Tensor, "*r n half 2"],
        contexts: tuple[Attended, ...],
    ) -> Float[Tensor, "b n d"]:
        """Self-attention."""
        return self.attention(x, rotary)

    def attend(self, x: Float[Tensor, "b n d"], contexts: tuple[Attended, ...]) -> Float[Tensor, "b n d"]:
        """What comes between self-attention and MLP: nothing, since the condition is in the modulation."""
        return x

    def modulated(self, modulation: Float[Tensor, "b k 6 d"]) -> list[Float[Tensor, "b k d"]]:
        """Shift, scale and gate of attention, then of the MLP: shared ones and the block's table."""
        # One sum for each part: as views of one tensor all six would be kept for the backward pass.
        return [part + row for part, row in zip(modulation.unbind(2), self.table, strict=True)]

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "*r n half 2"],
        contexts: tuple[Attended, ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """The block's output for modulations of k = n tokens, or of k = 1 for all of them."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulated(modulation)
        x = x + gate_a * self.mix(self.attention_norm(x) * (1 + scale_a) + shift_a, rotary, contexts)
        x = self.attend(x, contexts)
        return x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m)
