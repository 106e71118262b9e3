"""A chat -> token ids, and which part of the chat each of them is: by the chat template of a model's folder,
or, for small models that have none, as plain text.
"""

import copy
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repfusion.llm.chats.eyes import Eyes
from repfusion.pretrained.config import read_json

PLAIN_CUE = "answer:"
"""Stands before what the language model is to say, where there is no chat template."""
TEMPLATE_FILE = "chat_template.json"
"""Where older processors keep their chat template; newer ones keep it where a tokenizer finds it."""


class ChatPart(IntEnum):
    """What a token of a chat is."""

    PADDING = 0
    TEMPLATE = 1
    """Begin token, roles, marks around images, and what else stands around the parts."""
    SYSTEM = 2
    IMAGE = 3
    INSTRUCTION = 4
    WRITTEN = 5
    """Decoded by the language model."""


USERS = (ChatPart.SYSTEM, ChatPart.INSTRUCTION)
"""Parts that are texts of whoever asks."""
MARKS = {"\ue001": ChatPart.SYSTEM, "\ue002": ChatPart.INSTRUCTION}
"""Characters of Unicode's private use that stand for the texts while the template is filled."""


@dataclass(frozen=True, eq=False)
class Chat:
    """One turn: what a language model is asked, under which system prompt and of which images."""

    instruction: str = ""
    images: Sequence[np.ndarray] = field(default=())
    """Each uint8 [h, w, 3]; they stand before the instruction."""
    system: str | None = None
    """None leaves the system prompt to the template, which may have one of its own."""


class Piece(NamedTuple):
    """Consecutive text of a filled template."""

    text: str
    part: ChatPart
    image: int = -1


class ChatTokens(NamedTuple):
    """Tokens of a chat, what each is, and of which image it is (-1: of none)."""

    ids: list[int]
    parts: list[ChatPart]
    image_of: list[int]


class ChatFormat:
    """How a language model reads a chat.

    A text of whoever asks is a text whatever it spells: control tokens are those of the template alone.

    Args:
        tokenizer: transformers'.
        folder: where it came from.
        begin_id: begins a plain text.
        eyes: of a model that sees; None refuses images.
        sees: whether the family sees, which decides how its templates want a message.
        needs_template: whether the family is never asked in plain text.

    Raises:
        ValueError: the folder has no chat template and the family needs one.
    """

    def __init__(
        self, tokenizer: Any, folder: Path, begin_id: int, eyes: Eyes | None, sees: bool, needs_template: bool
    ):
        self.folder, self.begin_id, self.eyes, self.sees = folder, begin_id, eyes, sees
        self.template = _template_of(tokenizer, folder)
        if self.template is None and needs_template:
            raise ValueError(
                f"MLLM folder {folder}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); copy it from where the model is from"
            )
        # each is always called in one way: a call of the other kind changes a tokenizer under other threads
        self.plain, self.parsing = tokenizer, copy.deepcopy(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.control = [token.content for token in added if token.special]
        places = [*MARKS, *([] if eyes is None else [eyes.image_token])]
        self._places = re.compile("(" + "|".join(map(re.escape, places)) + ")")
        self._skeletons: dict[tuple[bool, int], list[str]] = {}

    def tokens_of(self, chat: Chat, image_lengths: Sequence[int]) -> ChatTokens:
        """Tokens of a chat whose images have so many tokens each.

        Raises:
            ValueError: the template does not take such a chat, or the tokenizer does not know the image
                token.
        """
        pieces = list(self._filled(chat, image_lengths))
        rows = [(id, ChatPart.TEMPLATE, -1) for id in self._begin(pieces)]
        for chunk, is_plain in self._chunks(pieces):
            rows += self._encode(chunk, is_plain)
        found = ChatTokens(*(list(column) for column in zip(*rows, strict=True)))
        counts = Counter(found.image_of)
        if [counts[image] for image in range(len(image_lengths))] != list(image_lengths):
            assert self.eyes is not None
            raise ValueError(
                f"MLLM folder {self.folder}: its tokenizer does not read {self.eyes.image_token!r} as a "
                "token of its own; use the tokenizer that the model was trained with"
            )
        return found

    def _filled(self, chat: Chat, image_lengths: Sequence[int]) -> Iterator[Piece]:
        image = 0
        for text in self.skeleton(chat.system is not None, len(image_lengths)):
            if (part := MARKS.get(text)) is not None:
                said = chat.instruction if part == ChatPart.INSTRUCTION else chat.system
                yield Piece(said or "", part)
            elif self.eyes is not None and text == self.eyes.image_token:
                yield Piece(self.eyes.expanded(image_lengths[image]), ChatPart.IMAGE, image)
                image += 1
            else:
                yield Piece(text, ChatPart.TEMPLATE)

    def skeleton(self, has_system: bool, num_images: int) -> list[str]:
        """Texts of a template around the places of system prompt, images and instruction. Raises ValueError
        where each of them has not exactly one place.
        """
        key = has_system, num_images
        if key not in self._skeletons:
            rendered = self._render(has_system, num_images)
            found = [text for text in self._places.split(rendered) if text]
            self._check_places(Counter(found), has_system, num_images)
            self._skeletons[key] = found
        return self._skeletons[key]

    def _render(self, has_system: bool, num_images: int) -> str:
        system, instruction = MARKS
        if self.template is None:
            image = "" if self.eyes is None else self.eyes.image_token
            parts = [system] * has_system + [image * num_images] * (num_images > 0)
            return " ".join([*parts, instruction, PLAIN_CUE])
        import jinja2

        messages = [{"role": "system", "content": self._content(system, 0)}] * has_system
        messages.append({"role": "user", "content": self._content(instruction, num_images)})
        try:
            return self.parsing.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"MLLM folder {self.folder}: its chat template refuses a chat "
                f"with{'' if has_system else 'out'} a system prompt and {num_images} images: {error}"
            ) from error

    def _content(self, text: str, num_images: int) -> Any:
        """A message's content as templates of the family expect it."""
        return [{"type": "image"}] * num_images + [{"type": "text", "text": text}] if self.sees else text

    def _check_places(self, found: Counter[str], has_system: bool, num_images: int) -> None:
        expected = dict(zip(MARKS, (int(has_system), 1), strict=True))
        if self.eyes is not None:
            expected[self.eyes.image_token] = num_images
        named = {mark: part.name.lower() for mark, part in MARKS.items()}
        for place, number in expected.items():
            if found[place] != number:
                raise ValueError(
                    f"MLLM folder {self.folder}: its chat template shows {found[place]} times "
                    f"{named.get(place, place)!r}, expected {number}; use the template that the model was "
                    "trained with, or leave that part out"
                )

    def _begin(self, pieces: Sequence[Piece]) -> list[int]:
        """What stands before the text: what the tokenizer puts there, unless the template does."""
        if self.template is None:
            return [self.begin_id]
        begin, text = self.parsing.bos_token, "".join(piece.text for piece in pieces[:2])
        return [] if begin is not None and text.startswith(begin) else list(self.parsing("").input_ids)

    def _chunks(self, pieces: list[Piece]) -> Iterator[tuple[list[Piece], bool]]:
        """What is tokenised at once: everything, as transformers does; where a text spells a control token,
        each piece by itself, so that the text stays one.
        """
        texts = [piece.text for piece in pieces if piece.part in USERS]
        if not any(control in text for text in texts for control in self.control):
            yield pieces, False
            return
        for piece in pieces:
            yield [piece], piece.part in USERS

    def _encode(self, pieces: Sequence[Piece], is_plain: bool) -> Iterator[tuple[int, ChatPart, int]]:
        """Tokens of consecutive pieces, with what each is."""
        starts = list(accumulate((len(piece.text) for piece in pieces), initial=0))[:-1]
        found = (self.plain if is_plain else self.parsing)(
            "".join(piece.text for piece in pieces),
            add_special_tokens=False,
            split_special_tokens=is_plain,
            return_offsets_mapping=True,
            verbose=False,
        )
        for id, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            first, last = bisect_right(starts, start) - 1, bisect_right(starts, max(start, end - 1)) - 1
            piece = self._owner(pieces[first : last + 1])
            if piece.part != ChatPart.IMAGE or (self.eyes is not None and id == self.eyes.image_id):
                yield id, piece.part, piece.image
            else:
                yield id, ChatPart.TEMPLATE, -1

    @staticmethod
    def _owner(pieces: Sequence[Piece]) -> Piece:
        """The piece of a token that reaches over several: a text of whoever asks, if there is one."""
        return next((piece for piece in pieces if piece.part in USERS and piece.text), pieces[0])


def _template_of(tokenizer: Any, folder: Path) -> str | None:
    """The chat template of a folder, by its tokenizer or by its processor's file."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if found is None and (folder / TEMPLATE_FILE).is_file():
        found = read_json(folder / TEMPLATE_FILE, "MLLM").get("chat_template")
    return found if isinstance(found, str) else None
