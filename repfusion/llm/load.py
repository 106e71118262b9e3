"""A Hugging Face folder -> a language model: the one match over families."""

from pathlib import Path

import torch

from repfusion.files import weights_digest
from repfusion.llm.base import LanguageModel

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
"""Causal language models that load by themselves, by transformers' `model_type`."""


def load_language_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, with_head: bool = False
) -> LanguageModel:
    """The language model of a folder written by save_pretrained; a vision tower is left on disk, since noisy
    latents take the place of what it sees.

    Args:
        folder: a LLaVA (LLaVA-1.5-7B's class), or a causal language model, which gets a fresh projector.
        dtype: precision in which the weights are held.
        with_head: whether the head that scores the next token is kept.

    Raises:
        ValueError: where the folder is missing or holds another architecture.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"MLLM folder {folder}: no config.json; expected a folder written by save_pretrained"
        )
    # here and not above: whoever only reads configurations, such as `status`, need not wait for it
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    match config.model_type:
        case "llava":
            from repfusion.llm.llava import Llava as Family
        case name if name in LANGUAGE_MODELS:
            from repfusion.llm.causal import CausalLM as Family
        case other:
            raise ValueError(
                f"MLLM folder {folder}: model_type {other!r}; expected 'llava' or a causal language model"
            )
    language_model, head, projector = Family.load_parts(folder, config, dtype)
    tokenizer, digest = AutoTokenizer.from_pretrained(folder), weights_digest(folder)
    return Family(language_model, projector, tokenizer, folder, digest, head if with_head else None)
