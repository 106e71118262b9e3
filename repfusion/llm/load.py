"""A Hugging Face folder -> a language model: the one match over families."""

from pathlib import Path

import torch

from repfusion.config import naming
from repfusion.files import weights_digest
from repfusion.llm.base import LanguageModel
from repfusion.llm.tokenizer import check_tokenizer, load_tokenizer
from repfusion.pretrained.config import read_config, transformers_config
from repfusion.pretrained.weights import load_transformers

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
"""Causal language models that load by themselves, by transformers' `model_type`."""

SEEING = ("qwen2_5_vl", "qwen3_vl", "internvl")
"""Models that see, beside LLaVA."""


def family_of(folder: Path) -> type[LanguageModel]:
    """The family of a folder, by its config.json.

    Raises:
        ValueError: the folder is missing, or of no family.
    """
    # here and not above: whoever only reads configurations, such as `status`, need not wait for transformers
    match read_config(folder, "MLLM").get("model_type"):
        case "llava":
            from repfusion.llm.llava import Llava as Family
        case "qwen2_5_vl" | "qwen3_vl":
            from repfusion.llm.qwen_vl import QwenVL as Family
        case "internvl":
            from repfusion.llm.internvl import InternVL as Family
        case name if name in LANGUAGE_MODELS:
            from repfusion.llm.causal import CausalLM as Family
        case "t5":
            from repfusion.llm.t5 import T5Encoder as Family
        case other:
            raise ValueError(
                f"MLLM folder {folder}: model_type {other!r}; expected 'llava' or a causal language model: "
                f"{', '.join(LANGUAGE_MODELS)}; or another that sees: {', '.join(SEEING)}; or 't5', whose "
                "encoder is read"
            )
    return Family


def load_language_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    with_head: bool = False,
    on_meta: bool = False,
    with_eyes: bool = False,
) -> LanguageModel:
    """The language model of a folder written by save_pretrained.

    Args:
        folder: a LLaVA (LLaVA-1.5-7B's class), a Qwen2.5-VL or Qwen3-VL, an InternVL, a causal language
            model, or a T5, of which the encoder is read.
        dtype: precision in which the weights are held.
        with_head: whether the head that scores the next token is kept.
        on_meta: shapes without memory, and no digest: of the weights the headers alone are read.
        with_eyes: whether the vision tower is kept; RepFusion does without, since noisy latents take the
            place of what it sees.

    Raises:
        ValueError: where the folder is missing or holds another architecture, weights are missing, left over
            or of another shape, the tokenizer is missing or does not fit, or eyes are asked of a model that
            has none.
    """
    folder = Path(folder)
    Family = family_of(folder)
    config = transformers_config(folder, "MLLM")
    with naming(f"MLLM folder {folder}"):
        model_class = Family.model_class(config)
    tokenizer = load_tokenizer(folder)
    model = load_transformers(model_class, folder, "MLLM", dtype, Family.beside, on_meta)
    language_model, head, projector = Family.parts(model)
    check_tokenizer(tokenizer, language_model.get_input_embeddings().num_embeddings, folder)
    eyes = Family.open_eyes(model, tokenizer, folder) if with_eyes else None
    digest = "none" if on_meta else weights_digest(folder)
    return Family(language_model, projector, tokenizer, folder, digest, head if with_head else None, eyes)
