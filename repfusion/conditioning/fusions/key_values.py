"""Key/value concatenation: latent tokens of a DiT block attend, in one softmax, to each other and to keys
and values that the frozen language model's own attention has of the prompt, a layer a block. UniFusion
(arXiv 2510.12789, layerwise key-value fusion) compares it to LAP; FuseDiT (arXiv 2505.10046) is a public
study of it.

Faithful is what is read: a layer's cached keys and values. Where widths agree they can be concatenated as
they are; here they differ, so keys and values are each normalised and together projected to the block's.
The language model's keys carry its rotary positions; the projected ones stand along the diagonal after the
grid.
"""

from typing import Literal

import torch
from torch import nn

from repfusion.conditioning.base import Context, Prepared
from repfusion.conditioning.fusions.per_block import PerBlockConfig
from repfusion.conditioning.fusions.taps import TapsConditioner, frozen_reading, padded_after
from repfusion.inputs import Inputs
from repfusion.layers import RMSNorm
from repfusion.llm.base import LanguageModel


class KeyValuesConfig(PerBlockConfig):
    method: Literal["key_values"] = "key_values"
    """Each DiT block attends to a layer's own keys and values of the prompt."""


class KeyValuesConditioner(TapsConditioner):
    """Keys and values of a layer for each block, as contexts of all steps: keys first in the channels.

    Raises: ValueError: as `PerBlockConfig.taps_of` does, or where the language model keeps no keys and
        values.
    """

    def __init__(self, llm: LanguageModel, depth: int, config: KeyValuesConfig = KeyValuesConfig()):
        super().__init__(llm, config.taps_of(depth, len(llm.layers)))
        width = llm.key_width
        self.context_widths = (2 * width,) * depth
        self.key_norms = nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in self.taps)
        self.value_norms = nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in self.taps)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Normalised keys and values; `reuse` changes nothing: they are static."""
        prefix = inputs["prefix"]
        with frozen_reading(prefix.ids.device):
            pairs = self.llm.keys_values(prefix, self.taps)
        kept = padded_after([torch.cat(pair, dim=-1) for pair in pairs], prefix.mask)
        return Prepared(static=tuple(map(self._normalised, self.key_norms, self.value_norms, kept)))

    def _normalised(self, key_norm: nn.Module, value_norm: nn.Module, kept: Context) -> Context:
        keys, values = kept.tokens.chunk(2, dim=-1)
        return Context(torch.cat([key_norm(keys), value_norm(values)], dim=-1), kept.mask)
