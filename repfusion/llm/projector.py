"""LLaVA's projector: visual width -> the language model's width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.latents.statistics import VARIANCE_EPS, LatentStatistics


class Projector(nn.Module):
    """LLaVA-1.5's two-layer projector from visual width to language width."""

    def __init__(self, visual_width: int, width: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        from transformers.activations import ACT2FN

        self.linear_1 = nn.Linear(visual_width, width, bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(width, width, bias)

    def forward(self, x: Float[Tensor, "b n v"]) -> Float[Tensor, "b n w"]:
        return self.linear_2(self.act(self.linear_1(x)))

    @torch.no_grad()
    def take_latents(self, statistics: LatentStatistics) -> None:
        """Rewrites the first layer, so that it makes of latents what it made of their features.

        It has one weight for all places: this is exact where the statistics are the same at each, and else
        goes by their average. Without a bias, the mean stays out.
        """
        std = (statistics.var.mean(0) + VARIANCE_EPS).sqrt()
        first = self.linear_1
        if first.bias is not None:
            first.bias.add_(first.weight @ statistics.mean.mean(0).to(first.weight))
        first.weight.mul_(std.to(first.weight))
