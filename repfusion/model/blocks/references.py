"""The AdaLN block of two streams: a sequence of latent and text tokens, and reference tokens that see each
other alone, so that their keys and values can be kept (FLUX.2 klein, public code).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repfusion.layers import rotate
from repfusion.model.blocks.adaln import AdaLNBlock

Kept = tuple[Float[Tensor, "b h _ e"], Float[Tensor, "b h _ e"]]
"""Keys, at their places, and values."""


class ReferenceBlock(AdaLNBlock):
    """Self-attention of either stream, with the same weights; the sequence also sees what was kept of the
    references.
    """

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "_ k 6 d"],
        rotary: Float[Tensor, "*r n half 2"],
        references: Kept | None = None,
        mask: Bool[Tensor, "b m"] | None = None,
        goes_on: bool = True,
    ) -> tuple[Float[Tensor, "b n d"], Kept]:
        """The block's output, and the keys and values of `x`.

        Args:
            x: tokens of one stream.
            modulation: of each token, or one (k = 1) for all.
            rotary: where the tokens stand.
            references: what was kept of the other stream, which `x` sees after its own tokens.
            mask: the real ones of all tokens that are seen.
            goes_on: whether any block follows; else `x` comes back as it is, for its keys and values alone.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulated(modulation)
        mixed = self.attention_norm(x) * (1 + scale_a) + shift_a
        keys, values = self.attention.keys_values(mixed)
        seen = own = rotate(keys, rotary), values
        if not goes_on:
            return x, own
        if references is not None:
            seen = torch.cat([own[0], references[0]], dim=2), torch.cat([values, references[1]], dim=2)
        x = x + gate_a * self.attention(mixed, rotary, attended=seen, mask=mask)
        return x + gate_m * self.mlp(self.mlp_norm(x) * (1 + scale_m) + shift_m), own
