"""Conditioning methods by name: the one union of their settings, and the one match that builds their
parts.
"""

from repfusion.conditioning.base import Conditioner
from repfusion.conditioning.lap import LapConditioner, LapConfig
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner, NoisyLatentsConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig
from repfusion.conditioning.text_embed import TextEmbedConditioner, TextEmbedConfig
from repfusion.conditioning.transfusion import TransfusionConfig
from repfusion.llm.base import LanguageModel
from repfusion.model.denoiser import Denoiser
from repfusion.model.dit import DiT, DiTConfig
from repfusion.model.in_context import InContextDiT
from repfusion.model.velocity_head import VelocityHead

ConditioningConfig = NoisyLatentsConfig | TextEmbedConfig | LapConfig | QueriesConfig | TransfusionConfig
"""Settings of every method, told apart by `method`."""


def conditioner_and_denoiser(
    method: ConditioningConfig, dit: DiTConfig, llm: LanguageModel, latent_dim: int, grid: tuple[int, int]
) -> tuple[Conditioner, Denoiser]:
    """The parts of a method, fresh but for the language model and its projector.

    Args:
        method: its settings.
        dit: the denoiser's, for a method that does not bring its own.
        llm: the language model.
        latent_dim: channels of a latent token.
        grid: rows and columns of latent tokens.

    Raises:
        ValueError: parts do not fit each other.
    """
    num_tokens = grid[0] * grid[1]
    match method:
        case TransfusionConfig():
            conditioner = NoisyLatentConditioner(llm, latent_dim, num_tokens, method.reading())
            return conditioner, VelocityHead(llm.width, latent_dim)
        case NoisyLatentsConfig():
            conditioner = NoisyLatentConditioner(llm, latent_dim, num_tokens, method)
        case QueriesConfig():
            conditioner = QueriesConditioner(llm, num_tokens, method)
        case TextEmbedConfig():
            conditioner = TextEmbedConditioner(llm)
        case LapConfig():
            conditioner = LapConditioner(llm, method)
    kind = InContextDiT if method.is_in_context else DiT
    return conditioner, kind(dit, latent_dim, grid, conditioner.aligned_width, conditioner.context_widths)
