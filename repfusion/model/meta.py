"""A configuration -> a model of that size whose weights have shapes and no memory (torch's meta
device).

Where a folder that a configuration names is absent, its geometry comes from `configs/geometry/`: the
config.json of published models, under the folder's own name.
"""

from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from repfusion.config import read_values, validate
from repfusion.latents.drawing_decoder import DrawingDecoder, DrawingDecoderConfig
from repfusion.latents.load import Decoder, kind_of_decoder, load_decoder
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.layers import Grid
from repfusion.llm.base import LanguageModel
from repfusion.llm.load import family_of
from repfusion.llm.projector import Projector
from repfusion.llm.t5 import T5Encoder
from repfusion.llm.tokenizer import context_length
from repfusion.model.build import assemble
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.pretrained.config import transformers_config

CONFIGS = Path(__file__).parents[1] / "configs"
"""Trainings at the published scale, and the geometry of the models that they name."""
GEOMETRY = CONFIGS / "geometry"


class BareTokenizer:
    """What MLLM asks of a tokenizer, for a model that will never read a prompt. An instruction that a
    method puts before prompts has a token a word.
    """

    eos_token_id = pad_token_id = None
    bos_token_id = 1

    def __init__(self, model_max_length: int):
        self.model_max_length = model_max_length

    def __call__(self, texts: list[str], **options: bool) -> SimpleNamespace:
        """Tokens of texts, one a word."""
        return SimpleNamespace(input_ids=[[0 for _ in text.split()] for text in texts])

    def convert_ids_to_tokens(self, id: int) -> str:
        """A token that nobody will look for in a text."""
        return f"<{id}>"


def geometry_folder(folder: Path) -> Path:
    """The folder itself, or the one of its name in `configs/geometry/`.

    Raises:
        ValueError: where neither has a config.json.
    """
    if (folder / "config.json").is_file():
        return folder
    if (kept := GEOMETRY / folder.name / "config.json").is_file():
        return kept.parent
    known = ", ".join(sorted(path.parent.name for path in GEOMETRY.glob("*/config.json")))
    raise ValueError(
        f"{folder}: no config.json there, and no geometry of that name; expected a model's folder, or one "
        f"named as in {GEOMETRY}: {known}"
    )


def absent_folders(config: ModelConfig) -> list[Path]:
    """The folders of a config whose geometry comes from `configs/geometry/`."""
    folders = dict.fromkeys((config.mllm, *config.parts().values()))
    return [folder for folder in folders if geometry_folder(folder) != folder]


def meta_model(
    config: ModelConfig, text_config: Any, grid: Grid, latent_dim: int, **projector: Any
) -> TextToImage:
    """A model of any size without memory: its weights have shapes only.

    Args:
        config: of the model; of its folders that of a second language model alone is read.
        text_config: transformers' config of the language model.
        grid: rows and columns of latent tokens, of clips frames before them.
        latent_dim: channels of a latent token.
        projector: activation and bias of the MLLM's own, where they are not LLaVA-1.5's.
    """
    folder = config.conditioning.second_llm
    second = None
    with torch.device("meta"):
        own = Projector(latent_dim, text_config.hidden_size, **projector)
        llm = bare_llm(config, config.mllm, text_config, own)
        if folder is not None:
            text_config = transformers_config(geometry_folder(folder), "MLLM").get_text_config()
            second = bare_llm(config, folder, text_config)
        statistics = LatentStatistics.empty(prod(grid), latent_dim)
        return assemble(config, llm, statistics, grid, second)


def bare_llm(
    config: ModelConfig, folder: Path, text_config: Any, projector: Projector | None = None
) -> LanguageModel:
    """A language model that reads prompts, with its head where the method needs it, in the current device's
    memory.
    """
    family = T5Encoder if text_config.model_type == "t5" else LanguageModel
    dtype = getattr(torch, config.mllm_dtype)
    language_model = family.of_config(text_config, dtype)
    head = None
    if config.conditioning.needs_head:
        head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False, dtype=dtype)
        if text_config.tie_word_embeddings:
            head.weight = language_model.get_input_embeddings().weight
    tokenizer = BareTokenizer(context_length(text_config))
    return family(language_model, projector, tokenizer, folder, "none", head)


def seeing_model(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """A language model with its head and its eyes, of any size without memory, by the configurations of a
    folder: model and image processor.

    Raises:
        ValueError: the folder is of no family, or of one that sees nothing.
    """
    family = family_of(folder)
    config = transformers_config(folder, "MLLM")
    with torch.device("meta"):
        model = family.model_class(config)(config).to(dtype)
        model.tie_weights()
        language_model, head, projector = family.parts(model)
        tokenizer = BareTokenizer(context_length(config.get_text_config()))
        eyes = family.open_eyes(model, tokenizer, folder)
        return family(language_model, projector, tokenizer, folder, "none", head, eyes)


def meta_from_config(config: ModelConfig) -> TextToImage:
    """A model of any size from the config.json of the folders that a config names; no weights are read."""
    path = geometry_folder(config.encoder.path)
    geometry = config.encoder.model_copy(update={"path": path}).geometry
    if config.conditioning.reads_images:
        llm = seeing_model(geometry_folder(config.mllm), getattr(torch, config.mllm_dtype))
        with torch.device("meta"):
            statistics = LatentStatistics.empty(prod(geometry.grid), geometry.feature_dim)
            return assemble(config, llm, statistics, geometry.grid)
    source = transformers_config(geometry_folder(config.mllm), "MLLM")
    projector = {
        "activation": getattr(source, "projector_hidden_act", "gelu"),
        "bias": getattr(source, "multimodal_projector_bias", True),
    }
    return meta_model(config, source.get_text_config(), geometry.grid, geometry.feature_dim, **projector)


def meta_decoder(config: ModelConfig, grid: Grid) -> Decoder | None:
    """The decoder that a config names, for latents of `grid` tokens; None for a VAE whose weights are not
    there.
    """
    folder = geometry_folder(config.decoder)
    kind, fields = kind_of_decoder(folder), (folder / "config.json").read_text()
    if kind in ("vae", "video_vae"):
        has_weights = any(folder.glob("*.safetensors"))
        return load_decoder(folder, grid).to("meta") if has_weights else None
    with torch.device("meta"):
        if kind == "drawing":
            drawing = DrawingDecoder(DrawingDecoderConfig.model_validate_json(fields))
            return drawing.requires_grad_(False)
        return RAEDecoder(RAEDecoderConfig.model_validate_json(fields)).requires_grad_(False)


def published() -> tuple[TextToImage, Decoder]:
    """RepFusion's scale (`configs/repfusion_7b_1.3b.yaml`): LLaVA-1.5-7B's language model, 24 x 24 tokens of
    width 1024, a DiT of 1.3B, RAE's ViT-XL decoder; no memory.
    """
    values = read_values(CONFIGS / "repfusion_7b_1.3b.yaml")
    config = validate(ModelConfig, values["model"])
    model = meta_from_config(config)
    decoder = meta_decoder(config, model.grid)
    assert decoder is not None
    return model, decoder
