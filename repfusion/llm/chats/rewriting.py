"""A prompt -> what the language model makes of it, within the chat that conditions: UniFusion's VERIFI
(arXiv 2510.12789).

Words in quotes are kept to the letter, which plain decoding often does not do: what the model wrote between
quotes is put right by what the prompt has between its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import ChatBatch
from repfusion.llm.chats.read import Writing, write

QUOTED = re.compile(r'"[^"]*"')


@dataclass(frozen=True)
class RewrittenPrompt:
    """Token ids of a rewritten prompt; none where the prompt itself serves, for the reason given."""

    ids: tuple[int, ...]
    reason: Literal["empty", "endless"] | None = None
    num_quotes: int = 0
    """Quotes of the prompt."""
    num_lost: int = 0
    """Quotes that the language model did not keep by itself."""


def rewrite(
    llm: LanguageModel, batch: ChatBatch, prompts: Sequence[str], max_new_tokens: int
) -> list[RewrittenPrompt]:
    """Rewritings of the prompts of chats, which are at their end.

    Raises:
        ValueError: the context does not hold so many tokens after the longest chat.
    """
    writings = write(llm, batch, max_new_tokens)
    return [_rewriting(llm, prompt, one) for prompt, one in zip(prompts, writings, strict=True)]


def _rewriting(llm: LanguageModel, prompt: str, writing: Writing) -> RewrittenPrompt:
    text = llm.tokenizer.decode(writing.ids, skip_special_tokens=True)
    asked = QUOTED.findall(prompt)
    lost = sum(quote not in text for quote in asked)
    if not writing.ended or not text.strip():
        reason = "endless" if not writing.ended else "empty"
        return RewrittenPrompt((), reason, len(asked), lost)
    mended = with_quotes(text, asked)
    ids = writing.ids if mended == text else llm.token_ids([mended])[0]
    return RewrittenPrompt(tuple(ids), None, len(asked), lost)


def with_quotes(text: str, asked: Sequence[str]) -> str:
    """A text whose quotes are those asked for, in their order; those for which it has no place are added at
    its end.
    """
    if all(quote in text for quote in asked):
        return text
    left = list(asked)
    mended = QUOTED.sub(lambda found: left.pop(0) if left else found[0], text)
    return " ".join([mended.rstrip(), *left])
