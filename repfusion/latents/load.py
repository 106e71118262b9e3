"""A folder -> the latent space that is denoised: its encoder and its decoder, of a representation autoencoder
or a VAE.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from repfusion.config import Config, Weights
from repfusion.latents.drawing_decoder import DrawingDecoder
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import is_vae
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.latents.tower import RepresentationEncoder
from repfusion.latents.vae import VAEDecoder, VAEEncoder
from repfusion.pretrained.config import read_config
from repfusion.weights import WEIGHTS

Decoder = RAEDecoder | VAEDecoder | DrawingDecoder
"""(features, seeds) -> pixels; all have `grid`, `feature_dim` and `image_size`. There is a seed a row, which
whoever decodes passes and one that draws reads.
"""
DecoderKind = Literal["rae", "vae", "drawing"]


class EncoderConfig(Config):
    path: Annotated[Path, Weights(to_sample=False)] = WEIGHTS / "vision_tower"
    """Folder of a vision tower (CLIP, SigLIP, DINOv2), of a model that holds one (CLIP, SigLIP, LLaVA), or of
    a VAE of diffusers (AutoencoderKL, AutoencoderDC).
    """
    layer: int = -2
    """Hidden state of a tower taken as features: -1 is the last block's output before the final norm, -2 the
    penultimate's. A VAE has none, and this is not read.
    """
    image_size: int | None = Field(default=None, ge=1)
    """Side in px of the images it takes, a multiple of its patch size (a VAE's factor); a tower's positions
    are interpolated. None is the size it was trained at.
    """

    def load(self, on_meta: bool = False, dtype: torch.dtype = torch.float32) -> PixelEncoder:
        """The encoder, on the CPU.

        Args:
            dtype: in which it computes; a LayerNorm at its end is float32 in any case.
            on_meta: shapes without memory: of a tower's weights the headers alone are read. A VAE, which is
                small, is read.

        Raises:
            ValueError: where the folder has no such tower, layer or size, or weights that do not fit.
        """
        if is_vae(self.path):
            return VAEEncoder.from_pretrained(self.path, dtype, self.image_size)
        return RepresentationEncoder.from_pretrained(self.path, self.layer, dtype, self.image_size, on_meta)


def kind_of_decoder(folder: str | Path) -> DecoderKind:
    """What a folder's config.json says that it holds; one without the file is taken for a RAE decoder's,
    which says what is missing.
    """
    if not (Path(folder) / "config.json").is_file():
        return "rae"
    if is_vae(folder, "decoder"):
        return "vae"
    return "drawing" if read_config(folder, "decoder").get("kind") == "drawing" else "rae"


def load_decoder(folder: str | Path, grid: tuple[int, int] | None = None, on_meta: bool = False) -> Decoder:
    """A RAE decoder, the decoder of a VAE, or one that draws; on the CPU in float32, frozen, in eval mode.

    Args:
        folder: as written by the decoder's save_pretrained, or a VAE's.
        grid: rows and columns of the tokens that a VAE is to decode; None is its own. The others have one.
        on_meta: shapes without memory: of the weights the headers alone are read. A VAE, which is small, is
            read.

    Raises:
        ValueError: where the folder lacks a file or the weights do not fit the config.
    """
    match kind_of_decoder(folder):
        case "vae":
            return VAEDecoder.from_pretrained(folder, grid)
        case "drawing":
            return DrawingDecoder.from_pretrained(folder, on_meta)
        case "rae":
            return RAEDecoder.from_pretrained(folder, on_meta)


def fitting_decoder(
    folder: str | Path, grid: tuple[int, int], feature_dim: int, on_meta: bool = False
) -> Decoder:
    """The decoder of a folder, for features of `feature_dim` channels on `grid`; see `load_decoder`.

    Raises:
        ValueError: where it reads other features than these.
    """
    decoder = load_decoder(folder, grid, on_meta)
    got, expected = (decoder.grid, decoder.feature_dim), (grid, feature_dim)
    if got != expected:
        raise ValueError(
            f"decoder {folder} reads (grid, width) {got}, the model makes {expected}: "
            "use a decoder trained on this encoder's features at this encoder.image_size"
        )
    return decoder
