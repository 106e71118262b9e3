"""Noise and prompts -> latents: steps of a solver down the shifted noise levels, with classifier-free
guidance in an interval of them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from repfusion.config import Config
from repfusion.devices.placing import Autocast, autocast_of
from repfusion.diffusion.flow import shift_noise_level
from repfusion.request import Branch, Request

Solver = Literal["euler", "heun", "dpm"]
OnStep = Callable[[int, float, Tensor], tuple[Tensor, bool]]
"""(step from 0, noise level it began at, latents [b, n, d]) -> latents in their place, and whether they are
the last.
"""


@runtime_checkable
class Velocities(Protocol):
    """What the sampler asks of a model: how its latents look, and their velocity under conditions read
    once.
    """

    latent_shape: tuple[int, int]
    shift: float

    @property
    def device(self) -> torch.device:
        """Where the latents are integrated."""
        ...

    def read(self, requests: Sequence[Request], branches: Sequence[Branch]) -> Any:
        """Requests for many steps; the result has `first(num)`, which is the same of fewer of them."""
        ...

    def velocity(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], prompted: Any
    ) -> Float[Tensor, "b n d"]:
        """Velocity of noisy latents at noise level t."""
        ...


class SamplerConfig(Config):
    num_steps: int = Field(default=30, ge=1)
    """Steps from noise to data, the last one ending at t = 0. Euler and DPM evaluate the velocity once a
    step, Heun twice, but for the last: 2 * num_steps - 1 (see `num_evaluations`).
    """
    solver: Solver = "euler"
    """Second order are `heun`, which averages the velocities at both ends of a step, and `dpm`, which goes on
    from the clean latents that the step before saw (DPM-Solver++ 2M).
    """
    guidance_scale: float = Field(default=4.0, ge=1)
    """v = v_empty + scale * (v_prompt - v_empty); 1 turns guidance off and saves half the work."""
    image_guidance_scale: float | None = Field(default=None, ge=1)
    """Guidance by images, of requests with some: v = v_empty + image scale * (v_images - v_empty) + scale
    * (v_all - v_images) (InstructPix2Pix, arXiv 2211.09800, equation 3), at half as much work again. None
    guides by all at once.
    """
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels low < t <= high at which to guide (arXiv 2404.07724); elsewhere the prompt alone is
    evaluated, at half the work.
    """
    precision: Literal["auto"] | Autocast = "auto"
    """Precision of the velocity; bf16 is autocast, auto that where the device multiplies in bfloat16. The
    latents are integrated in float32 in all.
    """

    @field_validator("guidance_interval")
    @classmethod
    def _in_order(cls, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"({low:g}, {high:g}): expected noise levels 0 <= low <= high <= 1")
        return interval

    def on(self, device: torch.device) -> "SamplerConfig":
        """A sampler as this one whose precision is what `auto` stands for on a device."""
        return self.model_copy(update={"precision": autocast_of(self.precision, device)})

    def guides(self, level: float) -> bool:
        """Whether the velocity at this noise level is guided."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low < level <= high

    def branches(self, requests: Sequence[Request]) -> tuple[Branch, ...]:
        """What of the requests is evaluated where they are guided."""
        if self.image_guidance_scale is not None and any(request.images for request in requests):
            return "full", "images", "none"
        return "full", "none"

    def guide(self, velocities: Sequence[Float[Tensor, "b n d"]]) -> Float[Tensor, "b n d"]:
        """The guided velocity, of those of the branches."""
        full, *images, none = velocities
        if not images:
            return none + self.guidance_scale * (full - none)
        ahead = self.guidance_scale * (full - images[0])
        return none + (self.image_guidance_scale or 1.0) * (images[0] - none) + ahead


def noise_levels(num_steps: int, shift: float) -> Float[Tensor, " steps"]:
    """num_steps + 1 levels from 1 to 0, both exact, spaced evenly before the shift; float64."""
    return shift_noise_level(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu"), shift)


def num_evaluations(config: SamplerConfig, shift: float) -> tuple[int, int]:
    """How often the velocity of an image is evaluated with guidance (two rows each: prompt and empty prompt;
    three with guidance by images) and without it (one row). Where the first is 0, the empty prompt is not
    even read.
    """
    levels = noise_levels(config.num_steps, shift).tolist()[:-1]
    if config.solver == "heun":
        levels += levels[1:]
    guided = sum(config.guides(level) for level in levels)
    return guided, len(levels) - guided


def integrate(
    velocity: Callable[[Float[Tensor, "b n d"], float], Float[Tensor, "b n d"]],
    noise: Float[Tensor, "b n d"],
    levels: Sequence[float],
    solver: Solver,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b n d"]:
    """Latents at the last of the noise levels, from those at the first, by dz/dt = velocity(z, t).

    Heun's method is that of EDM (arXiv 2206.00364, algorithm 1), its last step Euler's: the velocity is
    (z - E[latents | z, t]) / t, which at t = 0 is 0/0. It has a limit there only where the data have a
    density (then it is -z and says nothing of the noise left in z), no sample is ever trained at t = 0, and
    few are near it where the shift is large. Euler's last step ends at the network's estimate of the clean
    latents. So does that of DPM-Solver++ (2M; arXiv 2211.01095, algorithm 2), which in this parametrisation
    is Euler's step towards clean latents that are extrapolated from two of them.
    """
    z, before = noise, None
    for step, (level, next_level) in enumerate(pairwise(levels)):
        v = velocity(z, level)
        if solver == "heun" and next_level > 0:
            v = (v + velocity(z + (next_level - level) * v, next_level)) / 2
        elif solver == "dpm":
            clean = z - level * v
            if before is not None and next_level > 0:
                last_level, last = before
                ahead = log_snr(next_level) - log_snr(level)
                v = v - (clean - last) * (ahead / (2 * (log_snr(level) - log_snr(last_level)))) / level
            before = level, clean
        z = z + (next_level - level) * v
        if on_step is not None:
            z, is_last = on_step(step, level, z)
            if is_last:
                break
    return z


def log_snr(level: float) -> float:
    """log((1 - t) / t), half the logarithm of the ratio of signal to noise; -inf at t = 1."""
    return math.log((1 - level) / level) if level < 1 else -math.inf


@torch.no_grad()
def sample(
    model: Velocities,
    requests: Sequence[Request],
    noise: Float[Tensor, "b n d"],
    config: SamplerConfig,
    on_step: OnStep | None = None,
    negatives: Sequence[Request] | None = None,
) -> Float[Tensor, "b n d"]:
    """Latents of the requests, float32. The requests are read once; the noisy latents at every step.

    Args:
        model: gives velocities.
        requests: one an image.
        noise: latents at t = 1.
        config: steps, solver and guidance.
        on_step: called after each step; its latents take the place of these, and may be the last.
        negatives: what guidance leads away from, one an image; None is the model's empty prompt.

    Raises:
        ValueError: where noise and requests (or negatives) differ in number or the noise has another shape
            than the model's latents.
    """
    num = len(requests)
    if num != len(noise) or tuple(noise.shape[1:]) != model.latent_shape:
        raise ValueError(
            f"noise is {tuple(noise.shape)}, expected {(num, *model.latent_shape)} for {num} requests"
        )
    if negatives is not None and len(negatives) != num:
        raise ValueError(f"{len(negatives)} negatives for {num} requests; expected one for each")
    device = model.device
    guided, unguided = num_evaluations(config, model.shift)
    # The CPU's flash attention is slow on short sequences; the plain one is faster.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    is_bf16 = autocast_of(config.precision, device) == "bf16"
    with attention, torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        branches: tuple[Branch, ...] = config.branches(requests) if guided else ("full",)
        rows: list[tuple[Request, Branch]] = [(one, branch) for branch in branches for one in requests]
        if negatives is not None and guided:
            rows[-num:] = [(one, "full") for one in negatives]
        both = model.read([one for one, _ in rows], [branch for _, branch in rows])
        prompted_only = both.first(num) if guided and unguided else both

        def velocity(z: Float[Tensor, "b n d"], level: float) -> Float[Tensor, "b n d"]:
            t = torch.full((num,), level, device=device)
            if not config.guides(level):
                return model.velocity(z, t, prompted_only).float()
            every = len(branches)
            found = model.velocity(z.repeat(every, 1, 1), t.repeat(every), both).float()
            return config.guide(found.chunk(every))

        levels = noise_levels(config.num_steps, model.shift).tolist()
        return integrate(velocity, noise.to(device, torch.float32), levels, config.solver, on_step)
