"""Image shards and a frozen encoder -> the decoder that turns its features back into pixels (RAE, arXiv
2510.11690): L1 from noised features. LPIPS and the adversarial loss of that paper need torchvision and are
not here.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repfusion.data.order import hash64
from repfusion.decoding.config import DecoderTrainingConfig
from repfusion.decoding.pictures import ImageShards
from repfusion.files import write_json
from repfusion.foundation.optimise import Objective, optimise
from repfusion.generation.device import usable_device
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig

MEASURED = "measured.json"
"""Beside a decoder's weights: what it was trained on and how well it rebuilds what was held out."""


def new_decoder(config: DecoderTrainingConfig, encoder: PixelEncoder) -> RAEDecoder:
    """A decoder for the encoder's features, of fresh weights or of `init_from`.

    Raises:
        ValueError: `init_from` is a decoder of other features or sizes.
    """
    rows, columns = encoder.grid
    wanted = RAEDecoderConfig(
        feature_dim=encoder.feature_dim,
        grid=(rows, columns),
        patch_size=encoder.image_size // rows,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
    )
    if config.init_from is None:
        torch.manual_seed(config.seed)
        return RAEDecoder(wanted)
    found = RAEDecoder.from_pretrained(config.init_from)
    if found.config != wanted:
        raise ValueError(f"init_from {config.init_from} is a decoder of {found.config}, expected {wanted}")
    return found.requires_grad_(True)


def train_decoder(config: DecoderTrainingConfig) -> dict[str, float]:
    """Writes the decoder to `out`, and beside its weights how it was measured; returns that. A training that
    was cut off goes on.

    Raises:
        ValueError: no images, an encoder that is none, or a state of another training.
    """
    device = usable_device(config.device)
    encoder = config.encoder.load().to(device)
    pictures = ImageShards(config.images, encoder.image_size, config.held_out_share)
    decoder = new_decoder(config, encoder).train().to(device)
    size = config.length.batch_size

    def draw(step: int) -> tuple[Tensor, ...]:
        images = pictures.batch(step, config.seed, size).to(device)
        features = encoder.encode_images(images).features
        generator = torch.Generator(device).manual_seed(hash64("decoder noise", config.seed, step) % 2**63)
        sigma = config.feature_noise * torch.rand(size, 1, 1, generator=generator, device=device)
        noise = torch.randn(features.shape, generator=generator, device=device)
        return to_pixels(images), features + sigma * noise

    def loss(pixels: Tensor, features: Tensor) -> dict[str, Tensor]:
        return {"pixels": F.l1_loss(decoder(features).float(), pixels)}

    shown = optimise(decoder, config.length, Objective(draw, loss), state_of(config.out), config)
    decoder.save_pretrained(config.out, dtype=getattr(torch, config.dtype))
    images = pictures.measured(config.num_measured).to(device)
    found = {
        "psnr_db": psnr(decoder.eval(), encoder.encode_images(images).features, to_pixels(images)),
        "num_measured": float(len(images)),
        "num_images": float(len(pictures.drawn)),
        "num_steps": float(config.length.num_steps),
        **{f"loss_{name}": value for name, value in shown.items()},
    }
    write_json(config.out / MEASURED, found)
    return found


def state_of(out: Path) -> Path:
    """Where the state of a training that writes to `out` lies."""
    return out.with_name(f"{out.name}.state")


def to_pixels(images: Tensor) -> Float[Tensor, "b 3 h w"]:
    """8-bit images, channels last, as float32 in [0, 1]."""
    return images.movedim(-1, 1).float() / 255


@torch.no_grad()
def psnr(decoder: RAEDecoder, features: Float[Tensor, "b n d"], pixels: Float[Tensor, "b 3 h w"]) -> float:
    """Mean over images of 10 log10(1 / mean squared error), in dB."""
    rebuilt = torch.cat([decoder(part).float().clamp(0, 1) for part in features.split(32)])
    errors = (rebuilt - pixels).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float((-10 / math.log(10) * errors.log()).mean())
