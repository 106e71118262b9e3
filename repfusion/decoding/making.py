"""A recipe and an encoder -> the decoder that is trained, and what its images are turned into."""

import torch

from repfusion.decoding.config import DecoderMethod, DecoderRecipe, DrawingConfig
from repfusion.latents.drawing_decoder import DrawingDecoder, DrawingDecoderConfig
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import vae_config
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.vae import VAEDecoder, VAEEncoder


def rebuilding_decoder(config: DecoderRecipe, encoder: PixelEncoder) -> RAEDecoder:
    """An RAE decoder of the encoder's features, of fresh weights or of `init_from`. Raises ValueError where
    that is a decoder of other features or sizes.
    """
    torch.manual_seed(config.seed)
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
        return RAEDecoder(wanted)
    found = RAEDecoder.from_pretrained(config.init_from)
    if found.config != wanted:
        raise ValueError(f"init_from {config.init_from} is a decoder of {found.config}, expected {wanted}")
    return found.requires_grad_(True)


def drawing_sizes(
    config: DecoderRecipe, method: DrawingConfig, encoder: PixelEncoder
) -> DrawingDecoderConfig:
    """The configuration of a decoder that draws the encoder's images. Raises ValueError where the sizes do
    not fit each other.
    """
    return DrawingDecoderConfig(
        feature_dim=encoder.feature_dim,
        grid=encoder.grid,
        image_size=encoder.image_size,
        patch_size=method.patch_size,
        vae=None if method.vae is None else vae_config(method.vae),
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        shift=method.shift,
        num_steps=method.num_steps,
        solver=method.solver,
    )


def drawing_decoder(config: DecoderRecipe, encoder: PixelEncoder) -> DrawingDecoder:
    """A decoder that draws from the encoder's features, of fresh weights or of `init_from`; a VAE in it is
    frozen.

    Raises:
        ValueError: `init_from` is a decoder of other features or sizes, or the method has a patch size, a
            width or a VAE that does not fit the encoder's images.
    """
    method = config.method
    assert isinstance(method, DrawingConfig)
    torch.manual_seed(config.seed)
    wanted = drawing_sizes(config, method, encoder)
    decoder = DrawingDecoder(wanted)
    if decoder.vae is not None and method.vae is not None:
        vae = VAEDecoder.from_pretrained(method.vae, decoder.vae.grid)
        decoder.vae.load_state_dict(vae.state_dict())
    if config.init_from is None:
        return decoder
    found = DrawingDecoder.from_pretrained(config.init_from)
    sampling = {"num_steps": wanted.num_steps, "solver": wanted.solver}
    if found.config.model_copy(update=sampling) != wanted:
        raise ValueError(f"init_from {config.init_from} is a decoder of {found.config}, expected {wanted}")
    decoder.load_state_dict(found.state_dict())
    return decoder


def load_painter(method: DecoderMethod, image_size: int) -> VAEEncoder | None:
    """The encoder of the VAE in whose latents is drawn; None where pixels are. Raises ValueError where the
    folder is no VAE, or its factor does not divide the images.
    """
    if not isinstance(method, DrawingConfig) or method.vae is None:
        return None
    return VAEEncoder.from_pretrained(method.vae, image_size=image_size)
