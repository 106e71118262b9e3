"""The AdaLN block whose latent tokens attend, in one softmax, to each other and to a context that the block
does not change (Playground v3, arXiv 2409.10695; FuseDiT, arXiv 2505.10046).
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.layers import RMSNorm, rotate
from repfusion.model.blocks.adaln import AdaLNBlock, Attended


class JointKeysBlock(AdaLNBlock):
    """Keys and values of the one context beside those of the latent tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, context_width: int):
        super().__init__(dim, num_heads, mlp_ratio)
        self.context_key_value = nn.Linear(context_width, 2 * dim, bias=False)
        self.context_key_norm = RMSNorm(dim // num_heads, eps=1e-6)

    def keys_values(self, number: int, tokens: Float[Tensor, "b m c"]) -> tuple[Tensor, Tensor]:
        """Normalised keys, and values, of the one context's tokens, not yet at their places."""
        heads = self.attention.num_heads
        k, v = rearrange(self.context_key_value(tokens), "b m (s h e) -> s b h m e", s=2, h=heads)
        return self.context_key_norm(k), v

    def mix(
        self,
        x: Float[Tensor, "b n d"],
        rotary: Float[Tensor, "*r n half 2"],
        contexts: tuple[Attended, ...],
    ) -> Float[Tensor, "b n d"]:
        """Attention of latent tokens to themselves and to the context, whose keys are at their places."""
        ((keys, values, mask),) = contexts
        own_keys, own_values = self.attention.keys_values(x)
        own_keys = rotate(own_keys, rotary)
        pair = torch.cat([own_keys, keys.to(own_keys.dtype)], 2), torch.cat([own_values, values], 2)
        if mask is not None:
            mask = torch.cat([mask.new_ones(x.shape[:2]), mask], dim=1)
        return self.attention(x, rotary, attended=pair, mask=mask)
