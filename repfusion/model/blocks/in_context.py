"""The AdaLN block over one sequence of condition and latent tokens, which all see each other (UniFusion,
arXiv 2510.12789; single-stream blocks as in Krea 2).
"""

from jaxtyping import Float
from torch import Tensor

from repfusion.model.blocks.adaln import AdaLNBlock, Attended


class InContextBlock(AdaLNBlock):
    """Joint self-attention, in which padding is not seen."""

    def mix(
        self,
        x: Float[Tensor, "b n d"],
        rotary: Float[Tensor, "*r n half 2"],
        contexts: tuple[Attended, ...],
    ) -> Float[Tensor, "b n d"]:
        """Self-attention over the whole sequence; the one context holds the mask of its real tokens."""
        ((_, _, mask),) = contexts
        return self.attention(x, rotary, mask=mask)
