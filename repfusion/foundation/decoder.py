"""Scenes -> the RAE decoder: pixels from noised features of the frozen tower, L1 (RAE, section 3, without its perceptual terms)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from repfusion.foundation.perception import FoundationConfig, ScenePool, optimise
from repfusion.rae.decoder import RAEDecoder, RAEDecoderConfig
from repfusion.rae.encoder import RepresentationEncoder


def train_decoder(pool: ScenePool, config: FoundationConfig, folder: Path) -> RAEDecoder:
    torch.manual_seed(2)
    encoder = RepresentationEncoder.from_pretrained(folder / "vision_tower")
    decoder = RAEDecoder(RAEDecoderConfig(feature_dim=encoder.feature_dim, grid=encoder.grid, patch_size=config.patch_size))

    def loss_of_step(step: int) -> Tensor:
        _, pixels = pool.batch(config.batch_size)
        features = encoder(pixels)
        sigma = config.feature_noise * torch.rand(len(features), 1, 1)
        return F.l1_loss(decoder(features + sigma * torch.randn_like(features)).float(), pixels)

    optimise(list(decoder.parameters()), config, config.decoder_steps, loss_of_step, "decoder")
    decoder.save_pretrained(folder / "decoder", dtype=torch.float16)
    return decoder
