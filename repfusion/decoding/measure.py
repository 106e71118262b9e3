"""A decoder and images that it was not trained on -> how well it rebuilds them, and a picture of some."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from repfusion.decoding.perceptual import LPIPS
from repfusion.files import atomic_path
from repfusion.generation.outputs import fitting_scale, grid
from repfusion.latents.load import Decoder

AT_ONCE = 32
"""Images that are decoded at once."""
SHOWN = 8
"""Images in the picture."""
WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
"""Side and standard deviation of SSIM's Gaussian window."""
STABILISERS = 0.01**2, 0.03**2
"""SSIM's C1 and C2 for values in [0, 1]."""


@dataclass(frozen=True)
class HeldOut:
    """Images to measure on, and the exact features that they are rebuilt from."""

    pixels: Float[Tensor, "b 3 h w"]
    features: Float[Tensor, "b n d"] | None
    """None where nothing but the pixels is needed to rebuild them."""

    @torch.no_grad()
    def rebuilt(self, decoder: Decoder) -> Float[Tensor, "b 3 h w"]:
        """What the decoder makes of the features, in [0, 1]; the seed of an image is its number."""
        assert self.features is not None
        seeds = range(len(self.features))
        parts = enumerate(self.features.split(AT_ONCE))
        made = (decoder(part, seeds[i * AT_ONCE : i * AT_ONCE + len(part)]) for i, part in parts)
        return torch.cat([one.float().clamp(0, 1) for one in made])

    def measures(self, rebuilt: Float[Tensor, "b 3 h w"], perceptual: LPIPS | None) -> dict[str, float]:
        """Means over the images of PSNR in dB, of SSIM, and of LPIPS where its network is given."""
        found = {"psnr_db": psnr(rebuilt, self.pixels), "ssim": ssim(rebuilt, self.pixels)}
        if perceptual is not None:
            pairs = zip(rebuilt.split(AT_ONCE), self.pixels.split(AT_ONCE), strict=True)
            with torch.no_grad():
                found["lpips"] = float(torch.cat([perceptual(*pair) for pair in pairs]).mean())
        return found

    def draw(self, rebuilt: Float[Tensor, "b 3 h w"], path: Path) -> None:
        """A PNG of the first few images above what was made of them."""
        rows: Sequence[UInt8[Tensor, "n h w 3"]] = [
            (images[:SHOWN] * 255).round().byte().movedim(1, -1).cpu() for images in (self.pixels, rebuilt)
        ]
        tiles = [one.numpy() for row in rows for one in row]
        scale = fitting_scale(self.pixels.shape[-1] * 4, None)
        with atomic_path(path) as temporary:
            grid(tiles, [len(row) for row in rows], scale).save(temporary, "PNG")


def psnr(rebuilt: Float[Tensor, "b 3 h w"], pixels: Float[Tensor, "b 3 h w"]) -> float:
    """Mean over images of 10 log10(1 / mean squared error), in dB; values are in [0, 1]."""
    errors = (rebuilt - pixels).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float((-10 / math.log(10) * errors.log()).mean())


def ssim(rebuilt: Float[Tensor, "b 3 h w"], pixels: Float[Tensor, "b 3 h w"]) -> float:
    """Mean over images, channels and whole windows of the structural similarity (Wang et al. 2004, equation
    13, with their Gaussian window of 11 px); values are in [0, 1].

    Raises:
        ValueError: the images have a side below 11 px.
    """
    if min(pixels.shape[-2:]) < WINDOW_PX:
        raise ValueError(
            f"images of {pixels.shape[-1]} x {pixels.shape[-2]} px; SSIM needs {WINDOW_PX} px a side"
        )
    places = torch.arange(WINDOW_PX, device=pixels.device) - WINDOW_PX // 2
    window = (-(places**2) / (2 * WINDOW_SIGMA_PX**2)).exp()
    window = (window / window.sum()).view(1, 1, 1, -1)

    def mean(images: Tensor) -> Tensor:
        apart = images.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(apart, window), window.mT)

    own, other = mean(rebuilt), mean(pixels)
    variance, others = mean(rebuilt**2) - own**2, mean(pixels**2) - other**2
    covariance = mean(rebuilt * pixels) - own * other
    first, second = STABILISERS
    above = (2 * own * other + first) * (2 * covariance + second)
    return float((above / ((own**2 + other**2 + first) * (variance + others + second))).mean())
