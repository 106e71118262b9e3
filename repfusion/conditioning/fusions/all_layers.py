"""All layers: the prompt's hidden states in every layer of the frozen language model, each token's
normalised to zero mean and unit standard deviation, concatenated and projected. Cosmos Predict 2.5 (public
code) does so with the 28 layers of its Reason model.

Faithful are the layers (all but the embeddings), the normalisation without weights, the projection (Linear
with bias, GELU; 28 x 3584 -> 1024) and cross-attention, which is the default. Ours is the width where none
is named: that of the language model.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import Context, ContextInterface, MethodConfig, Prepared
from repfusion.conditioning.fusions.taps import TapsConditioner
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel

EPS = 1e-8


class AllLayersConfig(MethodConfig):
    method: Literal["all_layers"] = "all_layers"
    """The prompt's states in all layers, normalised and concatenated, the same at every step."""
    width: int | None = Field(default=None, ge=1)
    """Channels of the projected tokens (Cosmos: 1024); None is the language model's width."""
    interface: ContextInterface = "cross_attention"
    """How the DiT takes the tokens."""


def standardised(state: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
    """Each token with zero mean and unit standard deviation over its channels."""
    std, mean = torch.std_mean(state, dim=-1, keepdim=True)
    return (state - mean) / (std + EPS)


class AllLayersConditioner(TapsConditioner):
    """The projected states of all layers, as the one context of all steps."""

    def __init__(self, llm: LanguageModel, config: AllLayersConfig = AllLayersConfig()):
        super().__init__(llm, range(1, len(llm.layers) + 1))
        width = config.width or llm.width
        self.context_widths = (width,)
        self.join = nn.Linear(len(self.taps) * llm.width, width)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Projected states; `reuse` changes nothing: they are static."""
        states = self.contexts(inputs["prefix"])
        joined = torch.cat([standardised(one.tokens) for one in states], dim=-1)
        tokens = nn.functional.gelu(self.join(joined))
        return Prepared(static=(Context(tokens, states[0].mask),))
