"""Channel concatenation: hidden states of a few layers stand beside each other in a token's channels, and
one Linear makes of them what the DiT sees. FLUX.2 (public code) does so with three.

Faithful are the layers (FLUX.2 dev 10, 20, 30 of Mistral-Small's 40, klein 9, 18, 27 of Qwen3's 36:
quarters of the depth), that nothing is normalised before the one Linear without bias, and that this is as
wide as the DiT. Ours is that the DiT embeds these tokens as it embeds every context, by a norm and two
layers.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from repfusion.conditioning.base import Context, ContextInterface, MethodConfig, Prepared
from repfusion.conditioning.fusions.taps import TapsConditioner, spread
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel

NUM_QUARTERS = 4


class ChannelConcatConfig(MethodConfig):
    method: Literal["channel_concat"] = "channel_concat"
    """The prompt's states in a few layers, concatenated, the same at every step."""
    taps: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Hidden states that are read, as transformers counts them; None is FLUX.2's: a quarter, a half and three
    quarters of the depth.
    """
    interface: ContextInterface = "in_context"
    """How the DiT takes the tokens."""

    def taps_of(self, num_layers: int) -> tuple[int, ...]:
        """The taps of a language model of so many layers; quarters that fall together count once."""
        quarters = spread(NUM_QUARTERS, num_layers)[:-1]
        return tuple(dict.fromkeys(quarters)) if self.taps is None else self.taps


class ChannelConcatConditioner(TapsConditioner):
    """Concatenated states behind one Linear of `width` channels, as the one context of all steps. Raises
    ValueError where the language model has no such layers.
    """

    def __init__(self, llm: LanguageModel, width: int, config: ChannelConcatConfig = ChannelConcatConfig()):
        super().__init__(llm, config.taps_of(len(llm.layers)))
        self.context_widths = (width,)
        self.join = nn.Linear(len(self.taps) * llm.width, width, bias=False)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Joined states; `reuse` changes nothing: they are static."""
        states = self.contexts(inputs["prefix"])
        joined = torch.cat([one.tokens for one in states], dim=-1)
        return Prepared(static=(Context(self.join(joined), states[0].mask),))
