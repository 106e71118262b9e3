"""One layer a block: latent tokens of a DiT block attend, in one softmax, to each other and to the prompt's
hidden states in a layer of the block's own. Playground v3 (arXiv 2409.10695) does so.

Faithful is that image tokens alone ask, that keys and values of image and text are concatenated, that text
is not changed by the DiT, and that block i reads layer i where there are as many. Ours are the RMSNorm of
each layer's states, and rotary positions of text along the diagonal after the grid, as condition tokens
have them in context. Playground's DiT copies the language model's widths and skips; ours keeps its own.
"""

from typing import Literal

from repfusion.conditioning.fusions.per_block import PerBlockConfig


class LayerPerBlockConfig(PerBlockConfig):
    method: Literal["layer_per_block"] = "layer_per_block"
    """Each DiT block attends to the prompt's states in a layer of its own."""
