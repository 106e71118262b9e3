"""Prompts, codes of source images and codes of the image -> rows of one vocabulary, text before codes, as an
autoregressive model reads them (ILLUME+, arXiv 2504.01934, section 3.2).

drawing        begin prompt BEGIN_IMAGE codes
editing        begin prompt (BEGIN_IMAGE codes END_IMAGE, of each source) BEGIN_IMAGE codes
describing     begin BEGIN_IMAGE codes END_IMAGE caption end
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from repfusion.inputs import Inputs

SOURCE = -2
"""Stands for a code of a source image, which is filled in once that is encoded."""


@dataclass(frozen=True)
class Vocabulary:
    """The language model's ids, then the codes, then two marks."""

    num_text: int
    num_codes: int

    @property
    def begin_image(self) -> int:
        return self.num_text + self.num_codes

    @property
    def end_image(self) -> int:
        return self.num_text + self.num_codes + 1

    def ids(self, codes: Sequence[int]) -> list[int]:
        """Ids of codes."""
        return [self.num_text + code for code in codes]


@dataclass(frozen=True)
class TokenRow:
    """A sequence, and where in it what is to be predicted begins."""

    ids: list[int]
    first_code: int
    """Place of the image's first code."""
    first_word: int
    """Place of the caption's first token, of a sequence that describes."""
    caption: list[int] | None = None
    """The caption's ids; None where the image is drawn."""


def drawing(
    vocabulary: Vocabulary, prompt: Sequence[int], codes: Sequence[int], num_sources: int, source_length: int
) -> TokenRow:
    """An image after its prompt and the codes of its sources; `codes` are empty where it is to be drawn."""
    source = [vocabulary.begin_image, *[SOURCE] * source_length, vocabulary.end_image]
    before = [*prompt, *source * num_sources, vocabulary.begin_image]
    return TokenRow([*before, *vocabulary.ids(codes)], len(before), 1)


def describing(vocabulary: Vocabulary, begin: int, codes: Sequence[int], caption: Sequence[int]) -> TokenRow:
    """A caption, its end included, after its image; it is empty where it is to be written."""
    before = [begin, vocabulary.begin_image, *vocabulary.ids(codes), vocabulary.end_image]
    return TokenRow([*before, *caption], 2, len(before), list(caption))


def padded(
    rows: Sequence[TokenRow], pad: int, on_left: bool = False
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Ids, and which of them are real."""
    width = max(len(row.ids) for row in rows)
    ids, real = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = slice(width - len(row.ids), width) if on_left else slice(0, len(row.ids))
        ids[number, places], real[number, places] = torch.tensor(row.ids), True
    return ids, real


def written(rows: Sequence[TokenRow]) -> Inputs:
    """What is to be predicted in rows: where it begins, captions [b, m] of which m is the longest's length,
    and which of their tokens are real.
    """
    captions = [row.caption or [] for row in rows]
    width = max(1, *map(len, captions)) if captions else 1
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for number, caption in enumerate(captions):
        own = torch.tensor(caption, dtype=torch.long)
        ids[number, : len(caption)], mask[number, : len(caption)] = own, 1
    return {
        "first_code": torch.tensor([row.first_code for row in rows]),
        "first_word": torch.tensor([row.first_word for row in rows]),
        "is_described": torch.tensor([row.caption is not None for row in rows]),
        "caption": ids,
        "has_caption": mask,
    }
