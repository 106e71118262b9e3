"""Which caption a sample is seen with, and whether its condition is dropped: functions of the sample's seed
alone.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from repfusion.data.dataset import Sample
from repfusion.data.order import hash64
from repfusion.data.readers import Reader
from repfusion.diffusion.flow import DROPPED, uniforms
from repfusion.request import Branch, Request


def draw_caption(
    captions: Mapping[str, tuple[str, ...]], weights: Mapping[str, float], seed: int
) -> tuple[str, str]:
    """Name and text of the caption that a sample is seen with: a name by weight, then one of its variants,
    all alike.
    """
    names = list(captions)
    if len(names) == 1 and len(captions[names[0]]) == 1:
        return names[0], captions[names[0]][0]
    variant, fraction = divmod(hash64("caption", seed), 2**32)
    bounds = list(accumulate(weights[name] for name in names))
    name = names[bisect_right(bounds[:-1], fraction / 2**32 * bounds[-1])]
    return name, captions[name][variant % len(captions[name])]


@dataclass(frozen=True)
class Recipe:
    """How a training shows its samples."""

    condition_dropout: float = 0.0
    """Fraction of samples trained on nothing, for classifier-free guidance."""

    def draw(self, sample: Sample, seed: int, columns: Mapping[str, Reader]) -> tuple[Request, Branch]:
        """The request that a sample is seen with, and how much of it conditions.

        Args:
            sample: the sample; only the members that are used are read.
            seed: 64 bits of the sample in its epoch.
            columns: how columns of conditioning are read that the method can use, by name.
        """
        name, caption = draw_caption(sample.captions, sample.weights, seed)
        if float(uniforms([seed])[0, DROPPED]) < self.condition_dropout:
            return Request(caption), "none"
        arrays = {column: sample.read(column, name) for column in columns}
        computed = {column: torch.tensor(array) for column, array in arrays.items() if array is not None}
        return Request(caption, computed=computed), "full"
