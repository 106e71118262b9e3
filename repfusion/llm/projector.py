"""LLaVA's projector: visual width -> the language model's width; of hidden states, or of their latents."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.latents.statistics import LatentStatistics


class Projector(nn.Module):
    """LLaVA-1.5's two-layer projector from visual width to language width.

    One that took latents moves each token by `scale` and `shift` of its place first. These are buffers: no
    step changes them, and what the layers have learned means something else without them.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, visual_width: int, width: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        from transformers.activations import ACT2FN

        self.linear_1 = nn.Linear(visual_width, width, bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(width, width, bias)
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)

    def forward(self, x: Float[Tensor, "b n v"]) -> Float[Tensor, "b n w"]:
        if self.scale is not None and self.shift is not None:
            x = torch.addcmul(self.shift, x, self.scale)
        return self.linear_2(self.act(self.linear_1(x)))

    @torch.no_grad()
    def take_latents(self, statistics: LatentStatistics) -> None:
        """Makes of latents from now on what it made of the hidden states that they stand for; see
        `LatentStatistics.hidden_state`.

        Each channel's mean and spread over images and places go into the first layer, so that what this reads
        stays of order one: for the optimizer, and for bfloat16. What a place differs by goes into its `scale`
        and `shift`. Without a bias the mean goes there too.
        """
        assert self.scale is None, "the projector takes latents already"
        scale, shift = statistics.hidden_state()
        first = self.linear_1
        centre = torch.zeros_like(shift[0]) if first.bias is None else shift.mean(0)
        spread = (scale.square() + (shift - centre).square()).mean(0).sqrt()
        if first.bias is not None:
            first.bias.add_((first.weight.double() @ centre.to(first.weight.device)).to(first.weight))
        first.weight.mul_(spread.to(first.weight))
        self.scale = (scale / spread).to(first.weight)
        self.shift = ((shift - centre) / spread).to(first.weight)
