"""Rectified flow: noise levels, interpolation, velocity; one noise draw per global sample position.

`t` is the noise level: t=0 data, t=1 noise; z_t = (1 - t) * latents + t * noise; velocity = noise - latents.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class FlowConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    base_dim: int = Field(default=4096, gt=0)
    """Latent dimension at which noise levels are not shifted (RAE, section 4.2; RepFusion)."""


def shift_factor(num_tokens: int, channels: int, base_dim: int = 4096) -> float:
    """a = sqrt(m / base_dim), m = tokens x channels; 576 tokens x 1024 channels give 12."""
    return math.sqrt(num_tokens * channels / base_dim)


def shift_noise_level(u: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """s = a u / (1 + (a - 1) u): a > 1 moves noise levels towards 1; 0 and 1 stay (RepFusion, after SD3,
    arXiv 2403.03206).
    """
    scaled = shift * u
    return scaled / (scaled + (1 - u))  # in this form exactly 0 and 1 at the ends


def interpolate(
    latents: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b n d"]:
    """z_t = (1 - t) * latents + t * noise."""
    level = t[:, None, None]
    return (1 - level) * latents + level * noise


def velocity(latents: Float[Tensor, "b n d"], noise: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """dz_t/dt = noise - latents."""
    return noise - latents


@dataclass(frozen=True)
class Draw:
    """Per sample: the noise level (shifted), the noise, and whether the condition is dropped."""

    t: Float[Tensor, " b"]
    noise: Float[Tensor, "b n d"]
    dropped: Bool[Tensor, " b"]


def draw(
    seed: int,
    positions: list[int],
    shape: tuple[int, int],
    shift: float,
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> Draw:
    """The randomness of samples at global `positions` of a run.

    Each position has a generator of its own, so the draw does not depend on rank, micro-batch or world size.
    Noise levels are uniform before the shift (RepFusion). Drawn on the CPU: the same numbers on every device.
    """
    uniform, noise = torch.empty(len(positions), 2), torch.empty(len(positions), *shape)
    generator = torch.Generator()
    for row, position in enumerate(positions):
        generator.manual_seed(
            (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
        )
        uniform[row] = torch.rand(2, generator=generator)
        noise[row] = torch.randn(shape, generator=generator)
    t = shift_noise_level(uniform[:, 0], shift)
    return Draw(t.to(device), noise.to(device), (uniform[:, 1] < dropout).to(device))
