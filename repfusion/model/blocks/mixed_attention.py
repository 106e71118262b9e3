"""The AdaLN block with cross-attention to a context and, mixed with it, to a second one (LLMDiff-Adapter,
arXiv 2502.04412).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.layers import Attention
from repfusion.model.blocks.adaln import Attended
from repfusion.model.blocks.cross_attention import CrossAttentionBlock


class AddedAttention(nn.Module):
    """Cross-attention to a second context, and the weights of the mixture: old * a1 * e^b1 + new * a2 *
    e^b2.
    """

    def __init__(self, dim: int, num_heads: int, context_width: int):
        super().__init__()
        self.attention = Attention(dim, num_heads, context_dim=context_width)
        # a number a place: DeepSpeed takes no scalars
        self.scale = nn.Parameter(torch.ones(2))
        self.exponent = nn.Parameter(torch.zeros(2))

    def forward(
        self, x: Float[Tensor, "b n d"], old: Float[Tensor, "b n d"], context: Attended
    ) -> Float[Tensor, "b n d"]:
        """What the first attention found of `x`, mixed with what is found in the second context."""
        keys, values, mask = context
        new = self.attention(x, attended=(keys, values), mask=mask)
        first, second = self.scale * self.exponent.exp()
        return first * old + second * new


class MixedAttentionBlock(CrossAttentionBlock):
    """Cross-attention to two contexts. With the weights of a block of the first alone, it is that block at
    first: the second attention begins at zero.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, context_width: int, added_width: int):
        super().__init__(dim, num_heads, mlp_ratio, context_width)
        self.added = AddedAttention(dim, num_heads, added_width)

    def keys_values(self, number: int, tokens: Float[Tensor, "b m c"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens of the first (0) or second (1) context."""
        attention = self.added.attention if number else self.cross_attention
        return attention.keys_values(tokens)

    def attend(self, x: Float[Tensor, "b n d"], contexts: tuple[Attended, ...]) -> Float[Tensor, "b n d"]:
        """Adds the mixture of what the tokens find in either context."""
        (keys, values, mask), second = contexts
        queries = self.cross_norm(x)
        old = self.cross_attention(queries, attended=(keys, values), mask=mask)
        return x + self.added(queries, old, second)
