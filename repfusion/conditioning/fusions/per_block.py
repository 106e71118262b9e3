"""A context for each block of the DiT: block i sees the prompt as layer l(i) of the frozen language model
has it. How it enters is the denoiser's: added to condition tokens (hidden_injection), attended to beside
the image tokens (layer_per_block), or as the layer's own keys and values (key_values).
"""

from pydantic import Field
from torch import nn

from repfusion.conditioning.base import Context, MethodConfig, Prepared
from repfusion.conditioning.fusions.taps import TapsConditioner, spread
from repfusion.inputs import Inputs
from repfusion.layers import RMSNorm
from repfusion.llm.base import LanguageModel


class PerBlockConfig(MethodConfig):
    """Which layer each block sees."""

    taps: tuple[int, ...] | None = Field(default=None, min_length=1)
    """A layer for each DiT block, counted from 1, in the blocks' order; None spreads them evenly up to the
    last: layer i to block i where there are as many.
    """

    def taps_of(self, depth: int, num_layers: int) -> tuple[int, ...]:
        """The layer of each of `depth` blocks, of a language model of so many layers.

        Raises:
            ValueError: another number of taps than blocks, or one that is no layer.
        """
        taps = spread(depth, num_layers) if self.taps is None else self.taps
        if len(taps) != depth:
            raise ValueError(
                f"conditioning.taps are {len(taps)}, the DiT has {depth} blocks: each block sees one; name "
                f"{depth}, or leave taps out"
            )
        if not all(1 <= tap <= num_layers for tap in taps):
            raise ValueError(
                f"conditioning.taps are {taps}, the language model has {num_layers} layers; expected 1 to "
                f"{num_layers}"
            )
        return taps


class PerBlockConditioner(TapsConditioner):
    """The states of a layer for each block, each behind an RMSNorm with gain of its own, as contexts of all
    steps. Raises ValueError as `PerBlockConfig.taps_of` does.
    """

    def __init__(self, llm: LanguageModel, depth: int, config: PerBlockConfig):
        super().__init__(llm, config.taps_of(depth, len(llm.layers)))
        self.context_widths = (llm.width,) * depth
        self.tap_norms = nn.ModuleList(RMSNorm(llm.width, eps=1e-6) for _ in self.taps)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Normalised states; `reuse` changes nothing: they are static."""
        states = zip(self.tap_norms, self.contexts(inputs["prefix"]), strict=True)
        return Prepared(static=tuple(Context(norm(one.tokens), one.mask) for norm, one in states))
