"""Hidden-state injection: a layer's states of the prompt are added to the condition tokens before a block
of the DiT, layer after layer. UniFusion (arXiv 2510.12789) compares it to LAP.

Faithful is that every block has a layer of its own, in order, and that condition tokens stand in one
sequence with the latents. UniFusion does not say how a layer enters: here its states, normalised and
projected, are added to the tokens; the first block's are the tokens.
"""

from typing import Literal

from repfusion.conditioning.fusions.per_block import PerBlockConfig


class HiddenInjectionConfig(PerBlockConfig):
    method: Literal["hidden_injection"] = "hidden_injection"
    """Each DiT block adds a layer's states to the condition tokens."""
