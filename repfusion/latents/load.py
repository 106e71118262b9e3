"""A folder -> the latent space that is denoised: its encoder and its decoder, of a representation autoencoder
or a VAE of images or clips.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from repfusion.config import Config, Weights
from repfusion.latents.drawing_decoder import DrawingDecoder
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import LatentGeometry, is_vae, latent_geometry
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.latents.tower import RepresentationEncoder
from repfusion.latents.vae import VAEDecoder, VAEEncoder
from repfusion.latents.video_vae import (
    ClipGeometry,
    VideoEncoderConfig,
    VideoVAEDecoder,
    VideoVAEEncoder,
    is_video_vae,
)
from repfusion.layers import Grid
from repfusion.pretrained.config import read_config
from repfusion.weights import WEIGHTS

Decoder = RAEDecoder | VAEDecoder | DrawingDecoder | VideoVAEDecoder
"""(features, seeds) -> pixels, of a VideoVAEDecoder those of clips; all have `grid`, `feature_dim` and
`image_size`. There is a seed a row, which whoever decodes passes and one that draws reads.
"""
DecoderKind = Literal["rae", "vae", "drawing", "video_vae"]


class EncoderConfig(Config):
    path: Annotated[Path, Weights(to_sample=False)] = WEIGHTS / "vision_tower"
    """Folder of a vision tower (CLIP, SigLIP, DINOv2), of a model that holds one (CLIP, SigLIP, LLaVA), or of
    a VAE of diffusers (AutoencoderKL, AutoencoderDC); with `num_frames`, of a video VAE (AutoencoderKLWan).
    """
    layer: int = -2
    """Hidden state of a tower taken as features: -1 is the last block's output before the final norm, -2 the
    penultimate's. A VAE has none, and this is not read.
    """
    image_size: int | None = Field(default=None, ge=1)
    """Side in px of the images it takes, a multiple of its patch size (a VAE's factor); a tower's positions
    are interpolated. None is the size it was trained at.
    """

    num_frames: int | None = Field(default=None, ge=1)
    """Frames of the clips that it takes, 4k + 1, for a video VAE; None takes images."""

    @property
    def geometry(self) -> LatentGeometry | ClipGeometry:
        """Sizes of images or clips and of their latents. Raises ValueError where the folder has no such
        encoder or size.
        """
        if self.num_frames is None:
            return latent_geometry(self.path, self.image_size)
        return self._of_clips(self.num_frames).geometry

    def _of_clips(self, num_frames: int) -> VideoEncoderConfig:
        if self.image_size is None:
            raise ValueError(f"encoder.num_frames {num_frames} of no image_size: set encoder.image_size too")
        return VideoEncoderConfig(path=self.path, image_size=self.image_size, num_frames=num_frames)

    def load_latents(self, on_meta: bool = False) -> PixelEncoder | VideoVAEEncoder:
        """The encoder of images or clips, on the CPU in float32; a VAE is read `on_meta` too. Raises
        ValueError where the folder has no such tower, layer or size, or weights that do not fit.
        """
        return self.load(on_meta) if self.num_frames is None else self._of_clips(self.num_frames).load()

    def load(self, on_meta: bool = False, dtype: torch.dtype = torch.float32) -> PixelEncoder:
        """The encoder of images, on the CPU.

        Args:
            dtype: in which it computes; a LayerNorm at its end is float32 in any case.
            on_meta: shapes without memory: of a tower's weights the headers alone are read. A VAE, which is
                small, is read.

        Raises:
            ValueError: where the folder has no such tower, layer or size, or weights that do not fit.
        """
        if self.num_frames is not None:
            raise ValueError(f"encoder.num_frames {self.num_frames}: images have none; leave it out")
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
    if is_video_vae(folder, "decoder"):
        return "video_vae"
    return "drawing" if read_config(folder, "decoder").get("kind") == "drawing" else "rae"


def load_decoder(folder: str | Path, grid: Grid | None = None, on_meta: bool = False) -> Decoder:
    """A RAE decoder, the decoder of a VAE, or one that draws; on the CPU in float32, frozen, in eval mode.

    Args:
        folder: as written by the decoder's save_pretrained, or a VAE's.
        grid: rows and columns of the tokens that a VAE is to decode, of clips frames before them; None is an
            image VAE's own. The others have one.
        on_meta: shapes without memory: of the weights the headers alone are read. A VAE, which is small, is
            read.

    Raises:
        ValueError: where the folder lacks a file or the weights do not fit the config.
    """
    match kind := kind_of_decoder(folder):
        case "vae" | "video_vae" if grid is not None and (len(grid) == 3) != (kind == "video_vae"):
            what = "clips" if kind == "video_vae" else "images"
            raise ValueError(f"decoder {folder} makes {what}, the latents have the axes {grid}; take another")
        case "video_vae":
            if grid is None:
                raise ValueError(f"decoder {folder}: a video VAE, whose grid has to be given")
            assert len(grid) == 3
            return VideoVAEDecoder.for_grid(folder, grid)
        case "vae":
            assert grid is None or len(grid) == 2
            return VAEDecoder.from_pretrained(folder, grid)
        case "drawing":
            return DrawingDecoder.from_pretrained(folder, on_meta)
        case "rae":
            return RAEDecoder.from_pretrained(folder, on_meta)


def fitting_decoder(folder: str | Path, grid: Grid, feature_dim: int, on_meta: bool = False) -> Decoder:
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
