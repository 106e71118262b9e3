"""Sequences with masked places -> the same, filled, the surest first (MaskGIT, arXiv 2202.04200, section
3.2), with classifier-free guidance of the scores.

Every step changes what every place sees, since attention is bidirectional: nothing of a step can be kept for
the next.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from repfusion.config import Config
from repfusion.model.discrete.network import JointTransformer

OnFill = Callable[[int, Int[Tensor, "b n"]], bool]
"""(step from 0, ids with what is still masked) -> whether it is the last."""


class FillingConfig(Config):
    """How masked places are filled; the number of steps and the guidance are the sampler's."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores that a token is drawn by."""
    choice_temperature: float = Field(default=4.5, ge=0)
    """How much chance there is, at the first step, in which places are filled first; it falls to none at the
    last (MaskGIT's 4.5). 0 fills the surest.
    """


def left_masked(num_unknown: Int[Tensor, " b"], step: int, num_steps: int) -> Int[Tensor, " b"]:
    """How many places of each row stay masked after a step: MaskGIT's cosine of those that were to be filled,
    at least one fewer than a step before would leave, and none after the last.
    """
    if step + 1 == num_steps:
        return torch.zeros_like(num_unknown)
    return (num_unknown * math.cos(math.pi / 2 * (step + 1) / num_steps)).floor().long()


def uniforms_of(noise: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Uniform numbers in (0, 1) of normal ones, by their distribution function."""
    return (0.5 * torch.erfc(-noise / math.sqrt(2))).clamp(1e-6, 1 - 1e-6)


def drawn_ids(
    scores: Float[Tensor, "b m k"], chance: Float[Tensor, "b m"], temperature: float
) -> tuple[Int[Tensor, "b m"], Float[Tensor, "b m"]]:
    """An id for each place by inverting the distribution function, and its log-probability."""
    log_shares = (scores / temperature).log_softmax(dim=-1)
    below = log_shares.exp().cumsum(dim=-1) < chance[..., None]
    ids = below.sum(dim=-1).clamp(max=scores.shape[-1] - 1)
    return ids, log_shares.gather(-1, ids[..., None])[..., 0]


def keep_masked(
    confidence: Float[Tensor, "b n"], unknown: Bool[Tensor, "b n"], num_left: Int[Tensor, " b"]
) -> Bool[Tensor, "b n"]:
    """Which places stay masked: of the unknown ones, the `num_left` of the least confidence."""
    ranks = confidence.masked_fill(~unknown, math.inf).argsort(dim=1).argsort(dim=1)
    return unknown & (ranks < num_left[:, None])


@torch.no_grad()
def fill(
    network: JointTransformer,
    ids: Int[Tensor, "b n"],
    unknown: Bool[Tensor, "b n"],
    noise: Float[Tensor, "b s two_n"],
    config: FillingConfig,
    guidance_scale: float = 1.0,
    against: Callable[[Int[Tensor, "b n"]], Int[Tensor, "b n"]] | None = None,
    on_step: OnFill | None = None,
) -> Int[Tensor, "b n"]:
    """Fills the unknown places of sequences; the known ones stay as they are.

    Args:
        network: scores ids.
        ids: sequences; what stands at unknown places is not read.
        unknown: what is to be found.
        noise: normal numbers, two a place and step; as many steps as there are.
        config: temperatures.
        guidance_scale: scores = those against + scale * (scores - those against); 1 is off.
        against: sequences as they are now -> those that guidance leads away from.
        on_step: called after each step.
    """
    num_steps, num_unknown = noise.shape[1], unknown.sum(dim=1)
    chances = uniforms_of(noise).unflatten(-1, (network.num_tokens, 2))
    ids = ids.masked_fill(unknown, network.mask_id)
    for step in range(num_steps):
        is_guided = guidance_scale != 1 and against is not None
        rows = torch.cat([ids, against(ids)]) if is_guided and against is not None else ids
        states = network(rows)
        found, confidence = ids.clone(), torch.zeros(ids.shape, device=ids.device)
        for section in network.sections:
            scores = network.scores(states, section)
            if is_guided:
                own, other = scores.chunk(2)
                scores = other + guidance_scale * (own - other)
            drawn, log_shares = drawn_ids(scores, chances[:, step, section.places, 0], config.temperature)
            found[:, section.places] = drawn + section.first_id
            confidence[:, section.places] = log_shares
        spread = config.choice_temperature * (1 - (step + 1) / num_steps)
        confidence = confidence - spread * (-chances[:, step, :, 1].log()).log()
        ids = torch.where(unknown, found, ids)
        unknown = keep_masked(confidence, unknown, left_masked(num_unknown, step, num_steps))
        ids = ids.masked_fill(unknown, network.mask_id)
        if on_step is not None and on_step(step, ids):
            break
    return ids


def check_noise(noise: Float[Tensor, "b s two_n"], num: int, shape: Sequence[int]) -> None:
    """Raises ValueError where there is not the noise of as many sequences of a shape."""
    if tuple(noise.shape) != (num, *shape):
        raise ValueError(f"noise is {tuple(noise.shape)}, expected {(num, *shape)} for {num} requests")
