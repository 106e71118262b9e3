"""A configuration -> a generator of that size whose weights have shapes and no memory (torch's meta
device).
"""

from pathlib import Path
from typing import Any

import torch
import yaml

from repfusion.dit import DiTConfig
from repfusion.latent_space import EncoderConfig
from repfusion.mllm import MLLM, Projector
from repfusion.model import Generator, ModelConfig
from repfusion.rae.decoder import RAEDecoder, RAEDecoderConfig
from repfusion.rae.geometry import tower_config, tower_geometry
from repfusion.rae.statistics import LatentStatistics


class BareTokenizer:
    """What MLLM asks of a tokenizer, for a model that will never read a prompt."""

    eos_token_id = pad_token_id = None
    bos_token_id = 1

    def __init__(self, model_max_length: int):
        self.model_max_length = model_max_length


def meta_generator(
    config: ModelConfig, text_config: Any, grid: tuple[int, int], latent_dim: int, **projector: Any
) -> Generator:
    """A generator of any size without memory: its weights have shapes only.

    Args:
        config: of the model; its folders are not read.
        text_config: transformers' config of the language model.
        grid: rows and columns of latent tokens.
        latent_dim: channels of a latent token.
        projector: activation and bias of the MLLM's own, where they are not LLaVA-1.5's.
    """
    from transformers import AutoModel

    dtype = getattr(torch, config.mllm_dtype)
    with torch.device("meta"):
        language_model = AutoModel.from_config(text_config, dtype=dtype)
        tokenizer = BareTokenizer(text_config.max_position_embeddings)
        own = Projector(latent_dim, text_config.hidden_size, **projector)
        mllm = MLLM(language_model, own, tokenizer, config.mllm, "none")
        return Generator(config, mllm, LatentStatistics.empty(grid[0] * grid[1], latent_dim), grid)


def meta_from_config(config: ModelConfig) -> Generator:
    """From the config.json of the folders that a config names; no weights are read."""
    from transformers import AutoConfig

    _, vision = tower_config(config.encoder.path)
    grid = tower_geometry(config.encoder.path, config.encoder.image_size).grid
    source = AutoConfig.from_pretrained(config.mllm)
    projector = {
        "activation": getattr(source, "projector_hidden_act", "gelu"),
        "bias": getattr(source, "multimodal_projector_bias", True),
    }
    return meta_generator(config, source.get_text_config(), grid, vision["hidden_size"], **projector)


def meta_decoder(config: RAEDecoderConfig) -> RAEDecoder:
    with torch.device("meta"):
        return RAEDecoder(config).requires_grad_(False)


def published() -> tuple[Generator, RAEDecoder]:
    """RepFusion's scale: LLaVA-1.5-7B's language model, 24 x 24 tokens of width 1024, a DiT of 1.3B, RAE's
    ViT-XL decoder; no memory.
    """
    from transformers import LlamaConfig

    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    config = ModelConfig(
        mllm=Path("llava-1.5-7b"),
        mllm_dtype="bfloat16",
        encoder=EncoderConfig(path=Path("clip-vit-large-patch14-336")),
        dit=DiTConfig(hidden_size=2048, depth=24, num_heads=16),
    )
    decoder = RAEDecoderConfig(
        feature_dim=1024, grid=(24, 24), patch_size=14, hidden_size=1152, depth=28, num_heads=16
    )
    return meta_generator(config, text, (24, 24), 1024), meta_decoder(decoder)


def load_model_config(path: Path) -> ModelConfig:
    """The `model` of a training's YAML (or of a workflow's `train`), or a YAML of a model alone.

    Raises:
        ValueError: an unknown or wrong field.
    """
    fields = yaml.safe_load(path.read_text()) or {}
    fields = fields.get("train", fields)
    return ModelConfig.model_validate(fields.get("model") or {} if "model" in fields else fields)
