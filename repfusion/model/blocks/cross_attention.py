"""The AdaLN block with cross-attention to a context of any length between self-attention and MLP."""

from jaxtyping import Float
from torch import Tensor

from repfusion.layers import Attention, RMSNorm
from repfusion.model.blocks.adaln import AdaLNBlock, Attended


class CrossAttentionBlock(AdaLNBlock):
    """Cross-attention starts at zero: at first the block is the one without it."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, context_width: int):
        super().__init__(dim, num_heads, mlp_ratio)
        self.cross_norm = RMSNorm(dim, eps=1e-6)
        self.cross_attention = Attention(dim, num_heads, context_dim=context_width)

    def keys_values(self, number: int, tokens: Float[Tensor, "b m c"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the one context's tokens."""
        return self.cross_attention.keys_values(tokens)

    def attend(self, x: Float[Tensor, "b n d"], contexts: tuple[Attended, ...]) -> Float[Tensor, "b n d"]:
        """Adds what the tokens find in the one context."""
        ((keys, values, mask),) = contexts
        return x + self.cross_attention(self.cross_norm(x), attended=(keys, values), mask=mask)
