"""Micro-batches -> the gradients of one step of a decoder that draws: the squared error of its velocity at a
noise level and with noise that follow from each image's seed (diffusion/flow.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repfusion.decoding.gradients import Part, means
from repfusion.devices.compiling import Compilation
from repfusion.diffusion.flow import draw, interpolate, velocity
from repfusion.foundation.optimise import forward_pass
from repfusion.latents.drawing_decoder import DrawingDecoder
from repfusion.latents.vae import VAEEncoder


def latent_images(vae: VAEEncoder, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c r k"]:
    """Latents of a VAE as images, float32, of pixels in [0, 1]."""
    return rearrange(vae(pixels), "b (r k) c -> b c r k", r=vae.grid[0])


class Noised(NamedTuple):
    """What a decoder that draws reads of images."""

    features: Float[Tensor, "b n d"]
    """Noised ones of its encoder."""
    seeds: Sequence[int]
    """A 64-bit seed for each image, by which noise level and noise are drawn."""


class DrawingGradients:
    """How the gradients of a step are made; they are left, of this rank's share alone, in `grad` of what is
    trained.

    Args:
        decoder: is trained.
        painter: the VAE in whose latents it draws; None draws pixels.
        compilation: of the loss; None runs it as it is.
    """

    def __init__(self, decoder: DrawingDecoder, painter: VAEEncoder | None, compilation: Compilation | None):
        self.decoder, self.painter = decoder, painter
        self.device = next(decoder.parameters()).device
        self.error: Callable[..., Tensor] = self._error if compilation is None else compilation(self._error)

    def _error(
        self,
        canvas: Float[Tensor, "b m k"],
        noise: Float[Tensor, "b m k"],
        t: Float[Tensor, " b"],
        features: Float[Tensor, "b n d"],
    ) -> Float[Tensor, ""]:
        condition = self.decoder.read(features)
        found = self.decoder.velocity(interpolate(canvas, noise, t), t, condition)
        return F.mse_loss(found.float(), velocity(canvas, noise))

    @torch.no_grad()
    def canvas(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m k"]:
        """What is drawn, as normalised tokens."""
        return self.decoder.paint(pixels if self.painter is None else latent_images(self.painter, pixels))

    def plain(self, parts: Sequence[Part]) -> dict[str, Float[Tensor, ""]]:
        """Gradients; returns the loss `velocity`, a mean over the micro-batches."""
        config, found = self.decoder.config, []
        for pixels, (features, seeds) in parts:
            t, noise = draw(seeds, config.canvas_shape, config.shift)
            given = self.canvas(pixels), noise.to(self.device), t.to(self.device), features
            with forward_pass(self.device):
                error = self.error(*given)
            (error / len(parts)).backward()
            found.append({"velocity": error})
        return means(found)
