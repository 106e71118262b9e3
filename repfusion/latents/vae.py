"""Pixels <-> the latent image of a VAE as tokens: a KL VAE (arXiv 2112.10752) or a DC-AE (arXiv 2410.10733)
of diffusers.

Features are the posterior's mean (KL) or the code itself (DC-AE), as the network gives them: the folder's
`scaling_factor` and `shift_factor` are not applied, the statistics of the data set normalise each position
and channel anyway. Token r * columns + c is the latent pixel in row r, column c.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.files import weights_digest
from repfusion.latents.encoder import Encoding, PixelEncoder
from repfusion.latents.geometry import LatentGeometry, latent_geometry, vae_config, vae_factor
from repfusion.pretrained.config import said_of
from repfusion.pretrained.weights import refuse_misfits, refuse_not_finite, weight_files

STEM = "diffusion_pytorch_model"
"""How diffusers names the file of weights."""


class VAEEncoder(PixelEncoder):
    """The encoder's half of a VAE; arguments as of PixelEncoder."""

    def __init__(self, vae: nn.Module, geometry: LatentGeometry, digest: str):
        super().__init__(geometry, digest)
        vae.decoder = nn.Identity()
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, image_size: int | None = None
    ) -> "VAEEncoder":
        """Raises ValueError where the folder is missing or holds something else, or has no such size."""
        geometry = latent_geometry(folder, image_size)
        return cls(load_vae(folder, dtype), geometry, weights_digest(folder))

    def _encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Encoding:
        encoded = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype))
        latent = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        return Encoding(rearrange(latent.float(), "b d r c -> b (r c) d"), None)


class VAEDecoder(nn.Module):
    """The decoder's half of a VAE.

    Args: vae: changed in place. grid: rows and columns of the tokens; any will do, it is convolutional.
    """

    def __init__(self, vae: nn.Module, grid: tuple[int, int]):
        super().__init__()
        vae.encoder = nn.Identity()
        self.vae = vae.eval().requires_grad_(False)
        self.grid = grid
        self.feature_dim: int = vae.config.latent_channels
        self.image_size = grid[0] * vae_factor({**dict(vae.config), "_class_name": type(vae).__name__})
        """Side in px of the images it makes."""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, grid: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
    ) -> "VAEDecoder":
        """None is the grid at the VAE's own size. Raises ValueError where the folder holds something else, or
        where it names no size and no grid is given.
        """
        return cls(load_vae(folder, dtype), grid or latent_geometry(folder).grid)

    def forward(
        self, features: Float[Tensor, "b n d"], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped. It draws nothing: `seeds` are not read."""
        rows, columns = self.grid
        latent = rearrange(features, "b (r c) d -> b d r c", r=rows, c=columns)
        return self.vae.decode(latent.to(self.vae.dtype)).sample.float() / 2 + 0.5


def bare_vae(fields: Mapping[str, Any]) -> Any:
    """Diffusers' own module by the fields of its config.json, with fresh weights."""
    import diffusers

    return getattr(diffusers, fields["_class_name"]).from_config(dict(fields))


def load_vae(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Diffusers' own module; strictly, every weight is there and none is left over.

    Raises:
        ValueError: where the folder lacks a file, or weights are missing, left over, of another shape or not
            finite.
    """
    return load_diffusers(folder, vae_config(folder)["_class_name"], dtype)


def load_diffusers(folder: str | Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """An autoencoder of diffusers' class `name`; raises as `load_vae`."""
    import diffusers

    place = f"VAE folder {folder}"
    weight_files(Path(folder), "VAE", STEM)
    with said_of(place, f"as an {name}"):
        vae, report = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    misshapen = report["mismatched_keys"]
    refuse_misfits(place, report["missing_keys"], report["unexpected_keys"], misshapen)
    refuse_not_finite(vae, place)
    return vae
