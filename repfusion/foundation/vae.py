"""Scenes -> a small DC-AE (arXiv 2410.10733): the VAE latent space to compare a representation space with.

Pixels are rebuilt from noised latents, as the RAE decoder's are: the autoencoder has to spread its codes out,
and what a latent says survives the small errors a diffusion model makes. Noise is measured in standard
deviations of the latents, so their scale gains nothing.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.optimise import Objective, optimise
from repfusion.foundation.pool import ScenePool

CHANNELS = (32, 32, 64, 128, 128)
"""Channels of the VAE's stages; the first holds no layers, so the work begins at half the image's side."""


def train_vae(
    pool: ScenePool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Trains the VAE from scratch and writes a diffusers folder in half precision."""
    vae = make_vae(config, seed=5).to(pool.device)
    shown = optimise(vae, config.vae, vae_objective(vae, pool, config), state, config, until)
    vae.to(torch.float16).save_pretrained(folder / "vae")
    return shown


def make_vae(config: FoundationConfig, seed: int) -> Any:
    """A DC-AE whose latents lie on the tower's grid."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    num_stages = config.patch_size.bit_length()
    channels = CHANNELS[:1] * (num_stages - len(CHANNELS)) + CHANNELS[-num_stages:]
    return AutoencoderDC(
        latent_channels=config.vae_channels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, *(1,) * (num_stages - 1)),
        decoder_layers_per_block=(0, *(2,) * (num_stages - 2), 1),
        encoder_qkv_multiscales=((),) * num_stages,
        decoder_qkv_multiscales=((),) * num_stages,
    )


def vae_objective(vae: Any, pool: ScenePool, config: FoundationConfig) -> Objective:
    """L1 and squared error of pixels rebuilt from noised latents."""

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = pool.generator(5, step)
        target = pool.batch(config.vae.batch_size, generator, pool.dialogues).pixels * 2 - 1
        size, device = len(target), generator.device
        sigma = config.vae_noise * torch.rand(size, 1, 1, 1, generator=generator, device=device)
        shape = size, config.vae_channels, *config.grid
        return target, sigma * torch.randn(shape, generator=generator, device=device)

    def loss(target: Tensor, noise: Tensor) -> dict[str, Tensor]:
        latents = vae.encode(target).latent.float()
        scale = latents.std(dim=(0, 2, 3), keepdim=True)
        rebuilt = vae.decode(latents + scale * noise).sample.float()
        return {"l1": F.l1_loss(rebuilt, target), "square": F.mse_loss(rebuilt, target)}

    return Objective(draw, loss)
