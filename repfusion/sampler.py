"""Noise and prompts -> latents: Euler steps down the shifted noise levels, with classifier-free guidance."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from repfusion.flow import shift_noise_level
from repfusion.model import Generator


class SamplerConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = Field(default=30, ge=1)
    """Euler steps; exactly this many velocity evaluations (twice, with guidance), the last one ending at t =
    0.
    """
    guidance_scale: float = Field(default=4.0, ge=1)
    """v = v_empty + scale * (v_prompt - v_empty); 1 turns guidance off and saves half the work."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the velocity; bf16 is autocast. The latents are integrated in float32 in both."""


def noise_levels(num_steps: int, shift: float) -> Float[Tensor, " steps"]:
    """num_steps + 1 levels from 1 to 0, both exact, spaced evenly before the shift; float64."""
    return shift_noise_level(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


@torch.no_grad()
def sample(
    generator: Generator,
    prompts: list[str],
    noise: Float[Tensor, "b n d"],
    config: SamplerConfig,
    on_step: Callable[[int, float, Tensor], Tensor] | None = None,
) -> Float[Tensor, "b n d"]:
    """Latents of the prompts, float32. The prompts are read once; the noisy latents at every step.

    `on_step` is called after each step with its number from 0, the noise level it began at and the latents
    it ended with; what it returns takes their place.

    Raises:
        ValueError: where noise and prompts differ in number or the noise has another shape than the model's
        latents.
    """
    if len(prompts) != len(noise) or tuple(noise.shape[1:]) != generator.latent_shape:
        raise ValueError(
            f"noise is {tuple(noise.shape)}, expected {(len(prompts), *generator.latent_shape)} for "
            f"{len(prompts)} prompts"
        )
    device = generator.device
    # The CPU's flash attention is slow on short sequences; the plain one is faster.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        is_guided = config.guidance_scale != 1.0
        batch = generator.prompt_batch([*prompts, *[""] * len(prompts)] if is_guided else prompts, reuse=True)
        levels = noise_levels(config.num_steps, generator.shift).tolist()
        z = noise.to(device, torch.float32)
        for step, (level, next_level) in enumerate(pairwise(levels)):
            t = torch.full((len(z),), level, device=device)
            if is_guided:
                prompted, empty = (
                    generator.velocity(torch.cat([z, z]), torch.cat([t, t]), batch).float().chunk(2)
                )
                v = empty + config.guidance_scale * (prompted - empty)
            else:
                v = generator.velocity(z, t, batch).float()
            z = z + (next_level - level) * v
            if on_step is not None:
                z = on_step(step, level, z)
    return z
