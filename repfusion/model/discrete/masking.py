"""Noise levels and masks of samples, and the loss of masked diffusion (MDLM, arXiv 2406.07524, equation 10).

`t` is the noise level, the share of tokens that is masked: t=0 data, t=1 all masked. With the log-linear
schedule alpha_t = 1 - t the weight of a masked token's cross-entropy is alpha'_t / (alpha_t - 1) = 1 / t.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repfusion.diffusion.flow import LEVEL, uniforms

LEAST_LEVEL = 1e-3
"""The lowest noise level that is trained (MDLM's sampling_eps): the weight has a bound."""


def draw_masks(seeds: Sequence[int], num_tokens: int) -> tuple[Float[Tensor, " b"], Bool[Tensor, "b n"]]:
    """Noise level of each sample, uniform, and which of its tokens are masked, each with that chance; row i
    is a function of seeds[i] alone.
    """
    t = LEAST_LEVEL + (1 - LEAST_LEVEL) * uniforms(seeds)[:, LEVEL]
    generator = torch.Generator()
    chances = torch.stack([torch.rand(num_tokens, generator=generator.manual_seed(seed)) for seed in seeds])
    return t, chances < t[:, None]


def weighted(
    losses: Float[Tensor, "b m"], scored: Bool[Tensor, "b m"], t: Float[Tensor, " b"], num_tokens: int
) -> Float[Tensor, " b"]:
    """A sample's bound in nats a token: 1/t times the cross-entropy of each masked token, over the tokens of
    the whole sequence.
    """
    return (losses * scored).sum(dim=1) / t / num_tokens
