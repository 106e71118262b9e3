"""One layer and an adaptor: the prompt's hidden states in a single layer of the frozen language model,
refined by bidirectional blocks. UniFusion (arXiv 2510.12789) compares the last layer's, with an adaptor, to
LAP.

Faithful are the layers: -1, after the final norm, as UniFusion's baseline and Qwen-Image take it; -2, the
penultimate, as Z-Image and Lumina 2 do; -3 as HunyuanImage 2.1. UniFusion does not say what its adaptor is:
here it is Lumina 2's public one, a norm and two blocks over the tokens, which are also those that refine
LAP's pooled tokens, so that the comparison with LAP is one of layers alone.
"""

from typing import Literal

from pydantic import Field

from repfusion.conditioning.base import Context, ContextInterface, MethodConfig, Prepared
from repfusion.conditioning.fusions.taps import TapsConditioner, TokenRefiner
from repfusion.inputs import Inputs
from repfusion.layers import RMSNorm
from repfusion.llm.base import LanguageModel


class OneLayerConfig(MethodConfig):
    method: Literal["one_layer"] = "one_layer"
    """The prompt's states in one layer, refined, the same at every step."""
    layer: int = -1
    """The hidden state that is read, as transformers counts them: -1 is the last, -2 the penultimate one."""
    refiner_depth: int = Field(default=2, ge=0)
    """Bidirectional transformer blocks over the tokens: the adaptor."""
    interface: ContextInterface = "in_context"
    """How the DiT takes the tokens."""


class OneLayerConditioner(TapsConditioner):
    """The refined states of one layer, as the one context of all steps. Raises ValueError where the language
    model has no such layer.
    """

    def __init__(self, llm: LanguageModel, config: OneLayerConfig = OneLayerConfig()):
        super().__init__(llm, (config.layer,))
        self.context_widths = (llm.width,)
        self.tap_norm = RMSNorm(llm.width, eps=1e-6)
        self.refiner = TokenRefiner(llm.width, config.refiner_depth)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Refined states; `reuse` changes nothing: they are static."""
        (state,) = self.contexts(inputs["prefix"])
        tokens = self.refiner(self.tap_norm(state.tokens), state.mask)
        return Prepared(static=(Context(tokens, state.mask),))
