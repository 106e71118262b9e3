"""A folder -> the latent space that is denoised: its encoder and its decoder, of a representation autoencoder
or a VAE.
"""

from pathlib import Path
from typing import Annotated

from repfusion.config import Config, Weights
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import is_vae
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.latents.tower import RepresentationEncoder
from repfusion.latents.vae import VAEDecoder, VAEEncoder
from repfusion.weights import WEIGHTS

Decoder = RAEDecoder | VAEDecoder
"""Features -> pixels; both have `grid` and `feature_dim`."""


class EncoderConfig(Config):
    path: Annotated[Path, Weights(to_sample=False)] = WEIGHTS / "vision_tower"
    """Folder of a vision tower (CLIP, SigLIP, DINOv2), of a model that holds one (CLIP, SigLIP, LLaVA), or of
    a VAE of diffusers (AutoencoderKL, AutoencoderDC).
    """
    layer: int = -2
    """Hidden state of a tower taken as features: -1 is the last block's output before the final norm, -2 the
    penultimate's. A VAE has none, and this is not read.
    """
    image_size: int | None = None
    """Side in px of the images it takes, a multiple of its patch size (a VAE's factor); a tower's positions
    are interpolated. None is the size it was trained at.
    """

    def load(self) -> PixelEncoder:
        """The encoder, on the CPU in float32. Raises ValueError where the folder has no such tower, layer or
        size.
        """
        if is_vae(self.path):
            return VAEEncoder.from_pretrained(self.path, image_size=self.image_size)
        return RepresentationEncoder.from_pretrained(self.path, self.layer, image_size=self.image_size)


def load_decoder(folder: str | Path, grid: tuple[int, int] | None = None) -> Decoder:
    """A RAE decoder, or the decoder of a VAE; on the CPU in float32, frozen, in eval mode.

    Args:
        folder: as written by RAEDecoder.save_pretrained, or a VAE's.
        grid: rows and columns of the tokens that a VAE is to decode; None is its own. A RAE decoder has one.

    Raises:
        ValueError: where the folder lacks a file or the weights do not fit the config.
    """
    if (Path(folder) / "config.json").is_file() and is_vae(folder):
        return VAEDecoder.from_pretrained(folder, grid)
    return RAEDecoder.from_pretrained(folder)
