"""A configuration -> a model."""

import torch

from repfusion.conditioning.noisy_latents import NoisyLatentConditioner
from repfusion.latents.statistics import LatentStatistics
from repfusion.layers import Grid
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import load_language_model
from repfusion.model.config import CodesModelConfig, ModelConfig
from repfusion.model.discrete.illume import Illume, IllumeConfig
from repfusion.model.discrete.unidisc import UniDisc, UniDiscConfig
from repfusion.model.methods import conditioner_and_denoiser
from repfusion.model.text_to_image import TextToImage


def assemble(
    config: ModelConfig,
    llm: LanguageModel,
    statistics: LatentStatistics,
    grid: Grid,
    second: LanguageModel | None = None,
) -> TextToImage:
    """A model around a language model, or two, that are there already (real, or without memory)."""
    latent_dim = statistics.mean.shape[1]
    parts = conditioner_and_denoiser(config.conditioning, config.dit, llm, latent_dim, grid, second)
    return TextToImage(config, *parts, statistics, grid)


def load_llm(config: ModelConfig, on_meta: bool = False) -> LanguageModel:
    """The language model with what the method needs of it; raises what `load_language_model` does."""
    dtype, method = getattr(torch, config.mllm_dtype), config.conditioning
    return load_language_model(config.mllm, dtype, method.needs_head, on_meta, method.reads_images)


def load_second_llm(config: ModelConfig, on_meta: bool = False) -> LanguageModel | None:
    """The second language model of a method that has one; raises what `load_language_model` does."""
    folder = config.conditioning.second_llm
    if folder is None:
        return None
    return load_language_model(folder, getattr(torch, config.mllm_dtype), on_meta=on_meta)


def build_model(config: ModelConfig, statistics: LatentStatistics) -> TextToImage:
    """Loads the frozen parts named by the config; the trainable ones are fresh, but for the MLLM's projector,
    which from now on takes latents for the hidden states that they stand for.

    Raises:
        ValueError: where a folder is missing or parts do not fit each other.
    """
    encoder = config.encoder.load_latents()
    llm = load_llm(config)
    if statistics.mean.shape != (encoder.num_tokens, encoder.feature_dim):
        got, expected = tuple(statistics.mean.shape), (encoder.num_tokens, encoder.feature_dim)
        raise ValueError(
            f"latent statistics are of features {got}, the encoder {config.encoder.path} gives "
            f"{expected} at {encoder.image_size} px; re-run '{config.features}'"
        )
    has_own = llm.projector is not None
    model = assemble(config, llm, statistics, encoder.grid, load_second_llm(config))
    if has_own and isinstance(model.conditioner, NoisyLatentConditioner):
        model.conditioner.projector.take_latents(statistics)
    return model


def build_code_model(config: CodesModelConfig, on_meta: bool = False) -> UniDisc | Illume:
    """A model of discrete codes, whose trained weights are fresh but for a language model's; `on_meta`, which
    torch's meta device goes with, shapes without memory. Raises ValueError where a folder is none.
    """
    match config:
        case IllumeConfig():
            return Illume(config, on_meta)
        case UniDiscConfig():
            return UniDisc(config)
