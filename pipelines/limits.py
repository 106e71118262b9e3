"""Whoever reads a workflow's captions -> how many tokens they may have, by which tokenizers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.shards.digests import Digests, require_folder
from repfusion.config import naming
from repfusion.files import digest_of
from repfusion.llm.tokenizer import TOKENIZER_FILES, CaptionLimit, prompt_context

MostTokens = Annotated[int, Field(ge=1)] | Literal["context"] | None
"""The longest caption in tokens: what the context takes, or a number where that is less; None counts none."""
Limits = dict[str, CaptionLimit]
"""The limit by each tokenizer, by the tokenizer's digest."""
DIGEST_CHARS = 16


@dataclass(frozen=True)
class TextReader:
    """A language model that reads captions."""

    key: str
    """Where the configuration names it."""
    mllm: Path
    num_beside: int
    """Tokens that it reads after a caption: noisy latents, queries."""
    most: int | None = None
    """The longest caption in tokens, of a model that says so; None is what its context takes."""


def caption_limits(readers: Iterable[TextReader], most: MostTokens, digests: Digests) -> Limits:
    """What every reader takes, once for each tokenizer: no weights are read.

    Raises:
        ValueError: a folder is missing, or its configuration is not readable.
    """
    found: Limits = {}
    for reader in () if most is None else readers:
        require_folder(reader.mllm, reader.key)
        with naming(reader.key):
            room = reader.most
            if room is None:
                room = prompt_context(reader.mllm, reader.num_beside) - 1  # the begin token
        num_tokens = room if most == "context" else min(most, room)
        digest = tokenizer_digest(reader.mllm, digests)
        if digest not in found or num_tokens < found[digest].num_tokens:
            found[digest] = CaptionLimit(reader.mllm, num_tokens)
    return dict(sorted(found.items()))


def tokenizer_digest(folder: Path, digests: Digests) -> str:
    """Names what decides the tokens of a text."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return digest_of({file.name: digests.file(file) for file in files})[:DIGEST_CHARS]


def limit_fields(limits: Limits) -> dict[str, int]:
    """The limits as a part of a fingerprint."""
    return {digest: limit.num_tokens for digest, limit in limits.items()}
