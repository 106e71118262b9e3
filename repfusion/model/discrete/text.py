"""Captions <-> rows of token ids of one length, by the tokenizer of a language model's folder; no weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from repfusion.llm.base import PromptTooLong
from repfusion.llm.tokenizer import load_tokenizer, plain_ids


class CaptionRows:
    """Captions of at most `length` tokens, one of which ends them; the end token fills the rest of a row, and
    is predicted like any other, so that a caption of any length can be written.

    Args:
        folder: a language model's, whose tokenizer is used.
        length: tokens of a row.

    Raises:
        ValueError: there is no tokenizer, or one without an end and a begin token.
    """

    def __init__(self, folder: Path, length: int):
        self.folder, self.length = folder, length
        self.tokenizer: Any = load_tokenizer(folder)
        found = [self.tokenizer.eos_token_id, self.tokenizer.bos_token_id]
        ends = [one for one in found if one is not None]
        if not ends:
            raise ValueError(f"text folder {folder}: its tokenizer has neither an end nor a begin token")
        self.end_id: int = ends[0]
        self.num_ids: int = max(self.tokenizer.get_vocab().values()) + 1
        self.max_text_tokens = length
        """The longest caption in tokens, its end counted."""

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """Raises PromptTooLong where a caption and its end do not fit into a row."""
        self._ids(prompts)

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        found = plain_ids(self.tokenizer, prompts)
        for prompt, ids in zip(prompts, found, strict=True):
            if len(ids) + 1 > self.length:
                raise PromptTooLong(prompt, len(ids) + 1, self.length)
        return found

    def rows(self, prompts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Ids of captions. Raises PromptTooLong as `check_lengths`."""
        return torch.tensor([[*ids, *[self.end_id] * (self.length - len(ids))] for ids in self._ids(prompts)])

    def texts(self, rows: Int[Tensor, "b l"]) -> list[str]:
        """What rows say up to their first end token."""
        found = []
        for row in rows.tolist():
            ids = row[: row.index(self.end_id)] if self.end_id in row else row
            found.append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return found
