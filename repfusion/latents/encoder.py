"""Images or clips -> features, whatever the encoder: its sizes, and what it refuses."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from repfusion.latents.geometry import LatentGeometry
from repfusion.latents.statistics import TokenScale


class Encoding(NamedTuple):
    """What an encoder makes of images."""

    features: Float[Tensor, "b n d"]
    tokens: TokenScale | None
    """What its LayerNorm took of each token, `[b, n]`; None where it has none."""


class FrozenEncoder(nn.Module):
    """What 8-bit images or clips are encoded by. A subclass says in `encode_images` what it makes of them.

    Args: num_tokens, feature_dim: of its features. digest: names its weights.
    """

    def __init__(self, num_tokens: int, feature_dim: int, digest: str):
        super().__init__()
        self.num_tokens, self.feature_dim, self.digest = num_tokens, feature_dim, digest

    def encode_images(self, images: UInt8[Tensor, "b *f h w 3"]) -> Encoding:
        """Features of 8-bit images or clips of the encoder's size; nothing in it may wait for a GPU."""
        raise NotImplementedError

    @torch.no_grad()
    def first_not_finite(self, images: UInt8[Tensor, "b *f h w 3"]) -> str | None:
        """The name of the first part whose output is not finite; None where all is. A way to blame a layer
        once something went wrong: it waits for a GPU after every part.
        """
        found: list[str] = []

        def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        leaves = [(name, one) for name, one in self.named_modules() if not any(one.children())]
        hooks = [one.register_forward_hook(partial(look, name)) for name, one in leaves]
        try:
            self.encode_images(images)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None


class PixelEncoder(FrozenEncoder):
    """An encoder of images. A subclass says in `_encode` what it makes of pixels.

    Args: geometry: side of the images it takes in px, grid of its tokens, channels of a token. digest: names
    its weights.
    """

    def __init__(self, geometry: LatentGeometry, digest: str):
        super().__init__(geometry.grid[0] * geometry.grid[1], geometry.feature_dim, digest)
        self.image_size, self.grid, _ = geometry

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Features, float32; raises as `encode`."""
        return self.encode(pixels).features

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Encoding:
        """Features and what the LayerNorm took of them, float32.

        Raises:
            ValueError: for another image size than the encoder's, or values outside [0, 1].
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size}"
            raise ValueError(
                f"pixels are {pixels.shape[-2]} x {pixels.shape[-1]}, the encoder takes {expected}; "
                "resize in 'ingest'"
            )
        low, high = pixels.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels are in [{low:g}, {high:g}], expected [0, 1]; divide 8-bit values by 255"
            )
        with torch.no_grad():
            return self._encode(pixels)

    @torch.no_grad()
    def encode_images(self, images: UInt8[Tensor, "b h w 3"]) -> Encoding:
        """`encode` of 8-bit images of the encoder's size; nothing here waits for a GPU to have finished."""
        return self._encode(images.permute(0, 3, 1, 2).float().div(255))

    def _encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Encoding:
        raise NotImplementedError
