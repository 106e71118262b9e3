"""A configuration -> a text-to-image model: the one match over conditioning methods."""

from collections.abc import Mapping

import torch

from repfusion.conditioning.base import Conditioner
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner, NoisyLatentsConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig
from repfusion.conditioning.text_embed import TextEmbedConditioner, TextEmbedConfig
from repfusion.conditioning.transfusion import TransfusionConfig
from repfusion.data.readers import IMAGE_FEATURES, Reader, SampleArray
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.model.config import ModelConfig
from repfusion.model.denoiser import Denoiser
from repfusion.model.dit import DiT
from repfusion.model.text_to_image import TextToImage
from repfusion.model.velocity_head import VelocityHead


def conditioner_and_denoiser(
    config: ModelConfig, llm: LanguageModel, latent_dim: int, grid: tuple[int, int]
) -> tuple[Conditioner, Denoiser]:
    """The parts of a method, fresh but for the language model and its projector.

    Raises:
        ValueError: parts do not fit each other.
    """
    num_tokens = grid[0] * grid[1]
    match method := config.conditioning:
        case TransfusionConfig():
            conditioner = NoisyLatentConditioner(llm, latent_dim, num_tokens, method.reading())
            return conditioner, VelocityHead(llm.width, latent_dim)
        case NoisyLatentsConfig():
            conditioner = NoisyLatentConditioner(llm, latent_dim, num_tokens, method)
        case QueriesConfig():
            conditioner = QueriesConditioner(llm, num_tokens, method)
        case TextEmbedConfig():
            conditioner = TextEmbedConditioner(llm)
    widths = conditioner.aligned_width, conditioner.context_widths
    return conditioner, DiT(config.dit, latent_dim, grid, *widths)


def columns_of(config: ModelConfig) -> Mapping[str, Reader]:
    """How a model of this configuration reads the columns that it can use beside captions, by name; no
    weights are read.
    """
    own = TextEmbedConditioner.columns if isinstance(config.conditioning, TextEmbedConfig) else {}
    return {IMAGE_FEATURES: SampleArray(), **own}


def assemble(
    config: ModelConfig, llm: LanguageModel, statistics: LatentStatistics, grid: tuple[int, int]
) -> TextToImage:
    """A model around a language model that is there already (real, or without memory)."""
    parts = conditioner_and_denoiser(config, llm, statistics.mean.shape[1], grid)
    return TextToImage(config, *parts, statistics, grid)


def build_model(config: ModelConfig, statistics: LatentStatistics) -> TextToImage:
    """Loads the frozen parts named by the config; the trainable ones are fresh, but for the MLLM's projector,
    which from now on takes latents for features.

    Raises:
        ValueError: where a folder is missing or parts do not fit each other.
    """
    encoder = config.encoder.load()
    dtype, with_head = getattr(torch, config.mllm_dtype), config.captioning is not None
    llm = load_language_model(config.mllm, dtype, with_head)
    if statistics.mean.shape != (encoder.num_tokens, encoder.feature_dim):
        got, expected = tuple(statistics.mean.shape), (encoder.num_tokens, encoder.feature_dim)
        raise ValueError(
            f"latent statistics are of features {got}, the encoder {config.encoder.path} gives "
            f"{expected} at {encoder.image_size} px; re-run '{IMAGE_FEATURES}'"
        )
    has_own = llm.projector is not None
    model = assemble(config, llm, statistics, encoder.grid)
    if has_own and isinstance(model.conditioner, NoisyLatentConditioner):
        model.conditioner.projector.take_latents(statistics)
    return model
