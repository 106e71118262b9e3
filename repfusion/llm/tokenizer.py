"""A folder -> its tokenizer, which reads every text as text: `</s>` in a caption is no command.

What the context takes of a text is known from the folder's JSON alone, without the tokenizer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from repfusion.pretrained.config import (
    OWN_FILES_ALONE,
    read_config,
    read_json,
    refuse_remote_code,
    said_of,
    transformers_config,
)

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that hold a vocabulary; one of these sets has to be there."""
TOKENIZER_FILES = (
    *dict.fromkeys(name for names in VOCABULARIES for name in names),
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that decide what a tokenizer makes of a text."""
NFC_GROWTH = 3
"""The most by which Unicode's NFC lengthens UTF-8; a token takes at least a byte of the outcome."""
RELATIVE_CONTEXT = 512
"""Tokens at once of a T5, whose relative positions know no end: as many as it was pretrained on (arXiv
1910.10683).
"""
WHAT = "MLLM"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder written by save_pretrained.

    Raises:
        ValueError: its files are missing or damaged, it asks for code of its own, or it cannot read a text as
            nothing but text.
    """
    fields = tokenizer_fields(folder)
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        expected = " or ".join(" and ".join(names) for names in VOCABULARIES)
        raise ValueError(
            f"{WHAT} folder {folder}: no tokenizer; expected {expected}, with {TOKENIZER_CONFIG}: copy them "
            "from where the model is from, or save_pretrained its tokenizer there"
        )
    refuse_remote_code(fields, folder / TOKENIZER_CONFIG, WHAT)
    # here and not above: whoever only reads configurations, such as `status`, need not wait for it
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

    with said_of(f"{WHAT} folder {folder}", "with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_FILES_ALONE)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{WHAT} folder {folder}: its tokenizer is a {type(tokenizer).__name__}, which cannot read "
            "control tokens as text; expected one with a tokenizer.json"
        )
    if isinstance(tokenizer, T5Tokenizer):
        break_control_words(tokenizer)
    return tokenizer


def break_control_words(tokenizer: Any) -> None:
    """Splits what spells a control token in a text after its first character, before words are looked up:
    T5's vocabulary holds the control tokens as words, and they are the likeliest ones.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence as Steps
    from tokenizers.pre_tokenizers import Split

    words = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    first = Regex("|".join(f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in words))
    backend = tokenizer.backend_tokenizer
    steps = [Split(first, "isolated"), *([backend.pre_tokenizer] if backend.pre_tokenizer else [])]
    backend.pre_tokenizer = Steps(steps)


def tokenizer_fields(folder: Path) -> dict[str, Any]:
    """The fields of a tokenizer's configuration; none where there is no such file."""
    path = folder / TOKENIZER_CONFIG
    return read_json(path, WHAT) if path.is_file() else {}


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end tokens. Control tokens that a text spells, such as `</s>`
    or `<image>`, are characters like any others.
    """
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids


def check_tokenizer(tokenizer: Any, num_embeddings: int, folder: Path) -> None:
    """Whether a tokenizer fits a model with so many embeddings.

    Raises:
        ValueError: it has a token without an embedding, or makes a control token of what a text spells.
    """
    words = tokenizer.get_vocab()
    word, largest = max(words.items(), key=lambda item: item[1], default=("", -1))
    if largest >= num_embeddings:
        raise ValueError(
            f"{WHAT} folder {folder}: its tokenizer has token {word!r} with id {largest}, the model has "
            f"{num_embeddings} embeddings; use the tokenizer that it was trained with, or "
            "resize_token_embeddings and save it again"
        )
    control = {
        id: token.content
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special and id != tokenizer.unk_token_id
    }
    ids = plain_ids(tokenizer, list(control.values())) if control else []
    acting = [
        text for text, row in zip(control.values(), ids, strict=True) if not control.keys().isdisjoint(row)
    ]
    if acting:
        raise ValueError(
            f"{WHAT} folder {folder}: its tokenizer makes a control token of {acting[0]!r} in a text, so "
            "that a caption could command the model; use a tokenizer that keeps its control tokens out of "
            "its words"
        )


def context_length(config: Any) -> int:
    """Tokens that a language model with this config of transformers reads at once."""
    return RELATIVE_CONTEXT if config.model_type == "t5" else config.max_position_embeddings


def text_context(folder: Path) -> int:
    """Tokens that the language model of a folder reads at once, those after a prompt included."""
    config = read_config(folder, WHAT)
    own = config.get("text_config")
    length = (own if isinstance(own, dict) else config).get("max_position_embeddings")
    if isinstance(length, int):
        return length
    # what transformers takes for a field that is left out, or calls otherwise
    return context_length(transformers_config(folder, WHAT).get_text_config())


def prompt_context(folder: Path, num_beside: int) -> int:
    """Tokens of the longest prompt, begin token included, that leaves room for `num_beside` tokens after it:
    what the context holds, or what the tokenizer says where that is less.
    """
    room = text_context(folder) - num_beside
    said = tokenizer_fields(folder).get("model_max_length")
    return min(room, int(said)) if isinstance(said, int | float) else room


def longest_sure_bytes(num_tokens: int) -> int:
    """Bytes of UTF-8 up to which a text has at most `num_tokens` tokens, whatever it says: most captions need
    not be tokenised to know that they fit. A tokenizer may put a space before a text.
    """
    return num_tokens // NFC_GROWTH - 1


@dataclass(frozen=True)
class CaptionLimit:
    """How many tokens a caption may have, by whose tokenizer."""

    folder: Path
    """A language model's, whose tokenizer counts."""
    num_tokens: int
    """The most, begin token not counted."""

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded when the first caption needs it."""
        return load_tokenizer(self.folder)

    def excess(self, caption: str) -> str | None:
        """What is too long about a caption, in words; None for one that fits."""
        if len(caption.encode()) <= longest_sure_bytes(self.num_tokens):
            return None
        num_tokens = len(plain_ids(self.tokenizer, [caption])[0])
        if num_tokens <= self.num_tokens:
            return None
        return f"{num_tokens} tokens, at most {self.num_tokens}"
