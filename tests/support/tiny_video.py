"""A causal video VAE of diffusers' real class, a few thousand weights, and shards of clips that it takes."""

from pathlib import Path

import torch


def tiny_video_vae(folder: Path, seed: int = 0, num_halved: int = 2) -> Path:
    """A folder of an AutoencoderKLWan with a factor of 8 in space and of `2**num_halved` in time."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False] * (3 - num_halved) + [True] * num_halved,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vae.save_pretrained(folder)
    return folder
