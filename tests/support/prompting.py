"""Prompts as the tests ask a model for them: in training, without a cache, and in sampling, with one."""

from collections.abc import Sequence

import torch

from repfusion.conditioning.base import Conditioner, Context, Prepared
from repfusion.diffusion.flow import draw, uniforms
from repfusion.inputs import Inputs
from repfusion.model.text_to_image import Prompted, TextToImage
from repfusion.request import Branch, Request


def asked(prompts: Sequence[str]) -> tuple[list[Request], list[Branch]]:
    """A request for each prompt; an empty one conditions on nothing."""
    return [Request(prompt) for prompt in prompts], ["full" if prompt else "none" for prompt in prompts]


def prepare(conditioner: Conditioner, prompts: Sequence[str], reuse: bool = False) -> Prepared:
    """The prompts as the conditioner reads them, in training or (`reuse`) for all steps of sampling."""
    return conditioner.prepare(conditioner.collate(*asked(prompts)), reuse)


def condition_tokens(
    conditioner: Conditioner, prepared: Prepared, z_t: torch.Tensor, t: torch.Tensor
) -> Context:
    """The tokens that condition a denoiser, aligned or as contexts, whether they are static or not; several
    contexts of the same tokens beside each other in the channels, those of others behind each other.
    """
    condition = conditioner.condition(prepared, z_t, t)
    contexts = prepared.static + condition.contexts
    assert (condition.aligned is not None) != bool(contexts)
    if condition.aligned is not None:
        return Context(condition.aligned)
    tokens, masks = [one.tokens for one in contexts], [one.mask for one in contexts]
    if all(mask is masks[0] for mask in masks):
        return Context(torch.cat(tokens, dim=-1), masks[0])
    return Context(torch.cat(tokens, dim=1), torch.cat([mask for mask in masks if mask is not None], dim=1))


def read_prompts(model: TextToImage, prompts: Sequence[str], reuse: bool = False) -> Prompted:
    """The prompts as every step of sampling (`reuse`) or one forward pass of training reads them."""
    if reuse:
        return model.read(*asked(prompts))
    prepared = prepare(model.conditioner, prompts)
    return Prompted(prepared, model.denoiser.prefill(prepared.static))


def training_inputs(model: TextToImage, prompts: Sequence[str], seeds: Sequence[int], shift: float) -> Inputs:
    """What a forward pass of training takes, with features as a data set stores them."""
    requests, branches = asked(prompts)
    t, noise = draw(seeds, model.latent_shape, shift)
    latents = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    return {
        "request": model.conditioner.collate(requests, branches, seeds),
        "features": model.denormalise(latents).half(),
        "t": t,
        "noise": noise,
    }


def seeds_where(number: int, below: float, expected: Sequence[bool]) -> list[int]:
    """Seeds of which that number of their `uniforms` lies below `below` just where it is expected to."""
    row = uniforms(range(1, 1000))[:, number] < below
    pools = {value: (1 + (row == value).nonzero()[:, 0]).tolist() for value in (True, False)}
    return [pools[bool(value)].pop(0) for value in expected]
