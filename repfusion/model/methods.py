"""Conditioning methods by name: the one union of their settings, and the one match that builds their
parts.
"""

from math import prod

from repfusion.conditioning.base import Conditioner
from repfusion.conditioning.fusions.all_layers import AllLayersConditioner, AllLayersConfig
from repfusion.conditioning.fusions.channel_concat import ChannelConcatConditioner, ChannelConcatConfig
from repfusion.conditioning.fusions.hidden_injection import HiddenInjectionConfig
from repfusion.conditioning.fusions.key_values import KeyValuesConditioner, KeyValuesConfig
from repfusion.conditioning.fusions.layer_per_block import LayerPerBlockConfig
from repfusion.conditioning.fusions.one_layer import OneLayerConditioner, OneLayerConfig
from repfusion.conditioning.fusions.per_block import PerBlockConditioner
from repfusion.conditioning.lap import LapConditioner, LapConfig
from repfusion.conditioning.noisy_latents import NoisyLatentConditioner, NoisyLatentsConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig
from repfusion.conditioning.related.blip3o import Blip3oConditioner, Blip3oConfig
from repfusion.conditioning.related.gill import GillConditioner, GillConfig
from repfusion.conditioning.related.li_dit import LiDitConditioner, LiDitConfig
from repfusion.conditioning.related.llm_controller import LlmControllerConditioner, LlmControllerConfig
from repfusion.conditioning.related.metaquery import MetaQueryConditioner, MetaQueryConfig
from repfusion.conditioning.related.omni_video import OmniVideoConditioner, OmniVideoConfig
from repfusion.conditioning.related.query_kontext import QueryKontextConditioner, QueryKontextConfig
from repfusion.conditioning.text_embed import TextEmbedConditioner, TextEmbedConfig
from repfusion.conditioning.transfusion import TransfusionConfig
from repfusion.conditioning.unifusion import UniFusionConditioner, UniFusionConfig
from repfusion.layers import Grid
from repfusion.llm.base import LanguageModel
from repfusion.model.denoiser import Denoiser
from repfusion.model.dit import DiT, DiTConfig, MixedDiT, controlled_dit
from repfusion.model.in_context import InContextDiT, ReferencesDiT
from repfusion.model.per_block import InjectedDiT, JointKeysDiT
from repfusion.model.velocity_head import VelocityHead

ConditioningConfig = (
    NoisyLatentsConfig
    | TextEmbedConfig
    | LapConfig
    | UniFusionConfig
    | QueriesConfig
    | TransfusionConfig
    | OneLayerConfig
    | ChannelConcatConfig
    | AllLayersConfig
    | HiddenInjectionConfig
    | LayerPerBlockConfig
    | KeyValuesConfig
    | MetaQueryConfig
    | Blip3oConfig
    | LiDitConfig
    | GillConfig
    | LlmControllerConfig
    | QueryKontextConfig
    | OmniVideoConfig
)
"""Settings of every method, told apart by `method`."""


def conditioner_and_denoiser(
    method: ConditioningConfig,
    dit: DiTConfig,
    llm: LanguageModel,
    latent_dim: int,
    grid: Grid,
    second: LanguageModel | None = None,
) -> tuple[Conditioner, Denoiser]:
    """The parts of a method, fresh but for the language model and its projector.

    Args:
        method: its settings.
        dit: the denoiser's, for a method that does not bring its own.
        llm: the language model.
        latent_dim: channels of a latent token.
        grid: rows and columns of latent tokens, of clips frames before them.
        second: the second language model, of a method that has one.

    Raises:
        ValueError: parts do not fit each other.
    """
    num_tokens = prod(grid)
    kind = InContextDiT if method.is_in_context else DiT
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
        case OneLayerConfig():
            conditioner = OneLayerConditioner(llm, method)
        case ChannelConcatConfig():
            conditioner = ChannelConcatConditioner(llm, dit.hidden_size, method)
        case AllLayersConfig():
            conditioner = AllLayersConditioner(llm, method)
        case HiddenInjectionConfig():
            conditioner, kind = PerBlockConditioner(llm, dit.depth, method), InjectedDiT
        case LayerPerBlockConfig():
            conditioner, kind = PerBlockConditioner(llm, dit.depth, method), JointKeysDiT
        case KeyValuesConfig():
            conditioner, kind = KeyValuesConditioner(llm, dit.depth, method), JointKeysDiT
        case MetaQueryConfig():
            conditioner = MetaQueryConditioner(llm, method)
        case Blip3oConfig():
            conditioner = Blip3oConditioner(llm, method)
        case LiDitConfig():
            conditioner = LiDitConditioner(llm, method, second)
        case GillConfig():
            assert second is not None
            conditioner = GillConditioner(llm, second, latent_dim, method)
        case LlmControllerConfig():
            conditioner = LlmControllerConditioner(llm, method, second)
            kind = MixedDiT if method.trains_generator else controlled_dit
        case QueryKontextConfig():
            conditioner = QueryKontextConditioner(llm, method)
        case OmniVideoConfig():
            conditioner = OmniVideoConditioner(llm, latent_dim, grid, method)
        case UniFusionConfig():
            conditioner = UniFusionConditioner(llm, method)
            kind = ReferencesDiT if method.kept_references else kind
    return conditioner, kind(dit, latent_dim, grid, conditioner.aligned_width, conditioner.context_widths)
