"""Self-attention and MLP under AdaLN-Single (PixArt-alpha, arXiv 2310.00426), one modulation a token or one
for all (RepFusion, arXiv 2606.14700).
"""

from jaxtyping import Bool, Float
from torch import Tensor

from repfusion.layers import ModulatedBlock

Attended = tuple[Tensor, Tensor, Bool[Tensor, "b m"] | None]
"""Keys and values [b h m e] of a context in one block, and the mask of its real tokens."""


class AdaLNBlock(ModulatedBlock):
    """The modulated block, with what a condition that is attended to puts into it."""

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
