"""Rectified flow: noise levels, interpolation, velocity; the random draws of each sample.

`t` is the noise level: t=0 data, t=1 noise; z_t = (1 - t) * latents + t * noise; velocity = noise - latents.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from repfusion.config import Config
from repfusion.inputs import empty


class FlowConfig(Config):
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


LEVEL, DROPPED, CAPTIONED = range(3)
"""What each of a sample's `uniforms` decides: its noise level, whether its condition is dropped, and whether
it is captioned.
"""


def uniforms(seeds: Sequence[int]) -> Float[Tensor, "b 3"]:
    """Three numbers in [0, 1) a seed, from all of its 64 bits: a torch generator on the CPU reads 32 of them.
    SplitMix64 (Steele et al. 2014), outputs 1 to 3; the top 24 bits are what float32 holds.
    """
    steps = np.array([1, 2, 3], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = np.array([seed % 2**64 for seed in seeds], np.uint64)[:, None] + steps
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def draw(
    seeds: Sequence[int], shape: tuple[int, int], shift: float
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n d"]]:
    """Noise level and noise of each sample, on the CPU: row i is a function of seeds[i] (64 bits) alone,
    whatever rows lie beside it. The noise is the first that a `torch.Generator` of that seed draws.

    Noise levels are uniform before the shift (RepFusion). Both lie in page-locked memory where there is CUDA,
    from which copies to a GPU do not wait.
    """
    t = empty(len(seeds))
    t.copy_(shift_noise_level(uniforms(seeds)[:, LEVEL], shift))
    noise = empty(len(seeds), *shape)
    generator = torch.Generator()
    for seed, row in zip(seeds, noise.unbind(), strict=True):
        generator.manual_seed(seed)
        row.normal_(generator=generator)
    return t, noise


def initial_noise(seeds: Iterable[int], shape: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """Each image's noise is the first draw of a generator of its own, on the CPU: the same on every device,
    whatever else is in the batch.
    """
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(shape, generator=one, device="cpu") for one in generators])


def seeds_of(noise: Float[Tensor, "b n d"]) -> list[int]:
    """A 64-bit seed a row, of all bits of its noise in float32: what is drawn later of an image, such as a
    decoder's noise, so follows from what the image began from, however that came about.
    """
    rows = noise.detach().float().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]
