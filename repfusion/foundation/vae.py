"""Scenes -> a small DC-AE (arXiv 2410.10733): the VAE latent space to compare a representation space with.

Pixels are rebuilt from noised latents, as the RAE decoder's are: the autoencoder has to spread its codes out,
and what a latent says survives the small errors a diffusion model makes. Noise is measured in standard
deviations of the latents, so their scale gains nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repfusion.foundation.perception import FoundationConfig, ScenePool, optimise
from repfusion.latents.vae import load_vae

CHANNELS = (32, 32, 64, 128)
"""Channels of the VAE's stages; the first holds no layers, so the work begins at half the image's side."""


def train_vae(pool: ScenePool, config: FoundationConfig, folder: Path, polish: bool = False) -> None:
    """Trains the VAE from scratch for `vae_steps` or, to `polish`, on from the saved one for
    `vae_polish_steps` at less noise; writes a diffusers folder in half precision.
    """
    if polish:
        torch.manual_seed(7)
        vae = load_vae(folder / "vae").train()
        noise, num_steps = config.vae_polish_noise, config.vae_polish_steps
    else:
        vae = make_vae(config, seed=5)
        noise, num_steps = config.vae_noise, config.vae_steps
    loss = vae_loss(vae, pool, config.vae_batch_size, noise)
    optimise(list(vae.parameters()), config, num_steps, loss, "vae polish" if polish else "vae")
    vae.to(torch.float16).save_pretrained(folder / "vae")


def make_vae(config: FoundationConfig, seed: int) -> Any:
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=config.vae_channels,
        encoder_block_out_channels=CHANNELS,
        decoder_block_out_channels=CHANNELS,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 2, 2, 1),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
    )


def vae_loss(vae: Any, pool: ScenePool, batch_size: int, noise: float) -> Callable[[int], Tensor]:
    """L1 and squared error of pixels rebuilt from noised latents."""

    def loss_of_step(step: int) -> Tensor:
        _, pixels = pool.batch(batch_size)
        target = pixels * 2 - 1
        latents = vae.encode(target).latent.float()
        scale = latents.std(dim=(0, 2, 3), keepdim=True)
        sigma = noise * torch.rand(len(latents), 1, 1, 1)
        rebuilt = vae.decode(latents + sigma * scale * torch.randn_like(latents)).sample.float()
        return F.l1_loss(rebuilt, target) + F.mse_loss(rebuilt, target)

    return loss_of_step
