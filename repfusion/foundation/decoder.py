"""Scenes -> the RAE decoder: pixels from noised features of the frozen tower, L1 (RAE, section 3, without its
perceptual terms).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from repfusion.foundation.perception import FoundationConfig, ScenePool, optimise
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.tower import RepresentationEncoder


def train_decoder(pool: ScenePool, config: FoundationConfig, folder: Path, polish: bool = False) -> None:
    """Trains the RAE decoder from scratch for `decoder_steps` or, to `polish`, on from the saved one for
    `polish_steps` at less noise.
    """
    torch.manual_seed(4 if polish else 2)
    encoder = RepresentationEncoder.from_pretrained(folder / "vision_tower")
    if polish:
        decoder = RAEDecoder.from_pretrained(folder / "decoder").requires_grad_(True).train()
        noise, num_steps = config.refine_noise, config.polish_steps
    else:
        decoder = RAEDecoder(
            RAEDecoderConfig(feature_dim=encoder.feature_dim, grid=encoder.grid, patch_size=config.patch_size)
        )
        noise, num_steps = config.feature_noise, config.decoder_steps

    def loss_of_step(step: int) -> Tensor:
        _, pixels = pool.batch(config.batch_size)
        features = encoder(pixels)
        sigma = noise * torch.rand(len(features), 1, 1)
        return F.l1_loss(decoder(features + sigma * torch.randn_like(features)).float(), pixels)

    optimise(list(decoder.parameters()), config, num_steps, loss_of_step, "polish" if polish else "decoder")
    decoder.save_pretrained(folder / "decoder", dtype=torch.float16)
