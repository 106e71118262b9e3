"""Clips <-> the latent frames of a causal video VAE as tokens: Wan's (arXiv 2503.20314), of diffusers.

The first frame becomes a latent frame of its own, every group of 4 after it one, two or four more, none of
which sees what comes later. Features are the posterior's mean; `latents_mean` and `latents_std` of the folder
are not applied, the statistics of the data set normalise each position and channel anyway. Token
(f * rows + r) * columns + c is the latent pixel in row r, column c of latent frame f.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from repfusion.config import Config, Weights
from repfusion.files import weights_digest
from repfusion.latents.encoder import Encoding, FrozenEncoder
from repfusion.latents.geometry import check_size
from repfusion.latents.vae import load_diffusers
from repfusion.pretrained.config import read_config

VIDEO_VAE = "AutoencoderKLWan"
"""The class of diffusers."""
DEFAULTS = {
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "patch_size": None,
    "in_channels": 3,
}
"""What diffusers takes for a field that a config.json leaves out."""
CHUNK = 4
"""Frames that the VAE reads at a time, after the first."""


class ClipGeometry(NamedTuple):
    """Side of the square frames in px, frames of a clip; grid of frames, rows and columns, and channels."""

    image_size: int
    num_frames: int
    grid: tuple[int, int, int]
    feature_dim: int


class VideoEncoderConfig(Config):
    """A causal video VAE and the clips that it is given."""

    path: Annotated[Path, Weights(to_sample=False)]
    """Folder of a video VAE of diffusers (AutoencoderKLWan)."""
    image_size: int = Field(ge=1)
    """Side in px of the frames, a multiple of the VAE's factor; `ingest.image_size`."""
    num_frames: int = Field(ge=1)
    """Frames of a clip, 4k + 1; `ingest.clips.num_frames`."""

    @property
    def geometry(self) -> ClipGeometry:
        """Sizes of clips and latents. Raises ValueError where the folder has no such VAE or size."""
        return clip_geometry(self.path, self.image_size, self.num_frames)

    def load(self, dtype: torch.dtype = torch.float32) -> "VideoVAEEncoder":
        """The encoder, on the CPU. Raises ValueError where the folder has no such VAE, size or weights."""
        vae = load_diffusers(self.path, VIDEO_VAE, dtype)
        return VideoVAEEncoder(vae, self.geometry, weights_digest(self.path))


def clip_geometry(folder: str | Path, image_size: int, num_frames: int) -> ClipGeometry:
    """The latent space of a video VAE for clips of so many frames of `image_size` px.

    Raises:
        ValueError: where the folder holds something else, or a size is no multiple of the VAE's.
    """
    config = DEFAULTS | read_config(folder, "video VAE")
    if (name := config.get("_class_name")) != VIDEO_VAE:
        raise ValueError(f"video VAE folder {folder}: _class_name {name!r}; expected {VIDEO_VAE}")
    if config["in_channels"] != 3 * (config["patch_size"] or 1) ** 2:
        raise ValueError(f"video VAE folder {folder}: reads {config['in_channels']} channels, not RGB")
    if (num_frames - 1) % CHUNK:
        nearest = round((num_frames - 1) / CHUNK) * CHUNK + 1
        raise ValueError(
            f"encoder.num_frames {num_frames}: not 1 more than a multiple of {CHUNK}, as the VAE {folder} "
            f"reads clips; the nearest one is {nearest}"
        )
    factor = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
    side = check_size(image_size, factor, f"the factor of the VAE {folder}") // factor
    latent_frames = 1 + (num_frames - 1) // 2 ** sum(config["temperal_downsample"])
    return ClipGeometry(image_size, num_frames, (latent_frames, side, side), config["z_dim"])


def geometry_of_grid(folder: str | Path, grid: tuple[int, int, int]) -> ClipGeometry:
    """The latent space whose clips have a grid of latent frames, rows and columns.

    Raises:
        ValueError: where the folder holds something else, or no clip becomes such a grid.
    """
    config = DEFAULTS | read_config(folder, "video VAE")
    factor = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
    num_frames = 1 + (grid[0] - 1) * 2 ** sum(config["temperal_downsample"])
    geometry = clip_geometry(folder, grid[1] * factor, num_frames)
    if geometry.grid != grid:
        raise ValueError(f"video VAE folder {folder}: no clip of square frames becomes latents of {grid}")
    return geometry


def is_video_vae(folder: str | Path, what: str = "encoder") -> bool:
    """Whether a folder, which messages call a `what` folder, holds a video VAE of diffusers. Raises
    ValueError where there is no config.json.
    """
    return read_config(folder, what).get("_class_name") == VIDEO_VAE


class VideoVAEEncoder(FrozenEncoder):
    """The encoder's half of a video VAE.

    Args: vae: changed in place. geometry: of clips and latents. digest: names its weights.
    """

    def __init__(self, vae: nn.Module, geometry: ClipGeometry, digest: str):
        frames, rows, columns = geometry.grid
        super().__init__(frames * rows * columns, geometry.feature_dim, digest)
        vae.decoder = nn.Identity()
        self.geometry, self.vae = geometry, vae.eval().requires_grad_(False)
        self.image_size, _, self.grid, _ = geometry

    def forward(self, pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b n d"]:
        """Features, float32, of pixels in [0, 1]. Raises ValueError for clips of another size."""
        expected = (self.geometry.num_frames, 3, self.geometry.image_size, self.geometry.image_size)
        if pixels.shape[1:] != expected:
            raise ValueError(
                f"clips of (frames, channels, height, width) {tuple(pixels.shape[1:])}, the encoder takes "
                f"{expected}; set ingest.image_size and ingest.clips.num_frames"
            )
        low, high = pixels.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels are in [{low:g}, {high:g}], expected [0, 1]; divide 8-bit values by 255"
            )
        return self._encode(pixels)

    def encode_images(self, images: UInt8[Tensor, "b f h w 3"]) -> Encoding:
        """Features of 8-bit clips of the encoder's size, float32."""
        return Encoding(self._encode(images.movedim(-1, 2).float().div(255)), None)

    @torch.no_grad()
    def _encode(self, pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b n d"]:
        clips = rearrange(pixels * 2 - 1, "b f d h w -> b d f h w").to(self.vae.dtype)
        latent = self.vae.encode(clips).latent_dist.mean
        return rearrange(latent.float(), "b d f r c -> b (f r c) d")


class VideoVAEDecoder(nn.Module):
    """The decoder's half of a video VAE.

    Args: vae: changed in place. geometry: of latents and clips.
    """

    def __init__(self, vae: Any, geometry: ClipGeometry):
        super().__init__()
        vae.encoder = nn.Identity()
        self.geometry, self.vae = geometry, vae.eval().requires_grad_(False)
        self.image_size, self.num_frames, self.grid, self.feature_dim = geometry

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, image_size: int, num_frames: int, dtype: torch.dtype = torch.float32
    ) -> "VideoVAEDecoder":
        """Raises ValueError where the folder has no such VAE, size or weights."""
        geometry = clip_geometry(folder, image_size, num_frames)
        return cls(load_diffusers(folder, VIDEO_VAE, dtype), geometry)

    @classmethod
    def for_grid(cls, folder: str | Path, grid: tuple[int, int, int]) -> "VideoVAEDecoder":
        """The decoder of latents of a grid. Raises ValueError where the folder has no such VAE, or no clip
        becomes such a grid.
        """
        return cls(load_diffusers(folder, VIDEO_VAE), geometry_of_grid(folder, grid))

    def forward(
        self, features: Float[Tensor, "b n d"], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "b f 3 h w"]:
        """Pixels in [0, 1]. It draws nothing: `seeds` are not read."""
        frames, rows, columns = self.grid
        latent = rearrange(features, "b (f r c) d -> b d f r c", f=frames, r=rows, c=columns)
        pixels = self.vae.decode(latent.to(self.vae.dtype)).sample.float() / 2 + 0.5
        return rearrange(pixels, "b d f h w -> b f d h w")
