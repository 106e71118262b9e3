"""Chats -> a left-padded batch on the CPU: token ids, which part of the chat each token is, positions, images
as the vision tower takes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from repfusion.config import naming
from repfusion.llm.base import LanguageModel, PromptTooLong, take
from repfusion.llm.chats.eyes import Look, beside, text_positions
from repfusion.llm.chats.format import Chat, ChatPart, ChatTokens


@dataclass(frozen=True)
class ChatBatch:
    """Tokens of chats, left-padded, and the images in them, in order."""

    ids: Int[Tensor, "b n"]
    parts: Int[Tensor, "b n"]
    """What each token is, a `ChatPart`."""
    image_of: Int[Tensor, "b n"]
    """The image of its chat that a token is of, -1 where it is of none."""
    positions: Int[Tensor, "*axes b n"]
    """Position ids, which count real tokens only; with an axis for time, row and column where the model has
    such.
    """
    images: dict[str, Tensor]
    """What the vision tower takes; empty without images."""
    places: Int[Tensor, "k 2"]
    """Row and column of all image tokens, in order: the views of a chat's images stand beside each other, the
    first one's last column is -1 (`eyes.beside`).
    """

    @property
    def mask(self) -> Bool[Tensor, "b n"]:
        """Which tokens are no padding."""
        return self.parts != ChatPart.PADDING

    def is_any(self, *parts: ChatPart) -> Bool[Tensor, "b n"]:
        """Which tokens are of these parts."""
        return torch.isin(self.parts, torch.tensor(parts, device=self.parts.device))


class _Row(NamedTuple):
    tokens: ChatTokens
    looks: list[Look]


def tokenise_chats(
    llm: LanguageModel, chats: Sequence[Chat], written: Sequence[Sequence[int]] | None = None, room: int = 0
) -> ChatBatch:
    """Chats as a language model reads them; safe to call from another thread.

    Args:
        llm: whose chat template and eyes count.
        chats: what is asked.
        written: token ids that follow each chat, as `write` gave them, to be read at once (teacher forcing).
        room: tokens that are to be written after the chats and have to fit too.

    Raises:
        PromptTooLong: a chat is longer than the context.
        ValueError: images do not fit into the context, are none, or the model has no eyes; the chat template
            is missing or does not take such chats.
    """
    written = [()] * len(chats) if written is None else written
    rows = [_row(llm, chat, ids, room) for chat, ids in zip(chats, written, strict=True)]
    looks = [look for row in rows for look in row.looks]
    places = torch.cat([beside([view for look in row.looks for view in look.views]) for row in rows])
    return _pad(llm, [row.tokens for row in rows], _joined(looks), places)


def with_written(llm: LanguageModel, batch: ChatBatch, written: Sequence[Sequence[int]]) -> ChatBatch:
    """A batch of chats, on any device, with token ids that follow each of them."""
    rows = zip(batch.ids.tolist(), batch.parts.tolist(), batch.image_of.tolist(), strict=True)
    chats = []
    for row, new in zip(rows, written, strict=True):
        start = row[1].count(ChatPart.PADDING)
        ids, parts, image_of = (column[start:] for column in row)
        chats.append(_followed(ChatTokens(ids, parts, image_of), new))
    return _pad(llm, chats, batch.images, batch.places)


def _pad(
    llm: LanguageModel,
    chats: Sequence[ChatTokens],
    images: dict[str, Tensor],
    places: Int[Tensor, "k 2"],
) -> ChatBatch:
    width = max(len(chat.ids) for chat in chats)
    fill = (llm.pad_id, ChatPart.PADDING, -1)
    ids, parts, image_of = (
        torch.tensor(
            [[pad] * (width - len(chat.ids)) + list(chat[column]) for chat in chats], device=places.device
        )
        for column, pad in enumerate(fill)
    )
    mask = parts != ChatPart.PADDING
    positions = text_positions(mask)
    if llm.eyes is not None and images:
        positions = llm.eyes.positions(ids, mask, parts == ChatPart.IMAGE, images)
    return ChatBatch(ids, parts, image_of, positions, images, places)


def _followed(chat: ChatTokens, written: Sequence[int]) -> ChatTokens:
    return ChatTokens(
        [*chat.ids, *written],
        [*chat.parts, *[ChatPart.WRITTEN] * len(written)],
        [*chat.image_of, *[-1] * len(written)],
    )


def _row(llm: LanguageModel, chat: Chat, written: Sequence[int], room: int) -> _Row:
    if chat.images and llm.eyes is None:
        how = "has none" if not llm.sees else "was loaded without them (with_eyes)"
        raise ValueError(f"MLLM {llm.folder}: images need eyes, and it {how}; leave the images out")
    looks = []
    for number, image in enumerate(chat.images, 1):
        assert llm.eyes is not None
        with naming(f"image {number} of {len(chat.images)}"):
            looks.append(llm.eyes.look(image))
    tokens = llm.chat_format.tokens_of(chat, [look.num_tokens for look in looks])
    _check_length(llm, chat, tokens, looks, len(written) + room)
    return _Row(_followed(tokens, written), looks)


def _check_length(
    llm: LanguageModel, chat: Chat, tokens: ChatTokens, looks: Sequence[Look], after: int
) -> None:
    """Raises PromptTooLong, or ValueError that says how many images fit."""
    most = llm.context - after
    if len(tokens.ids) <= most:
        return
    for fitting in range(len(looks) - 1, -1, -1):
        fewer = llm.chat_format.tokens_of(chat, [look.num_tokens for look in looks[:fitting]])
        if len(fewer.ids) <= most:
            raise ValueError(
                f"{len(looks)} images and the prompt {chat.instruction[:60]!r} take {len(tokens.ids)} "
                f"tokens; the context of {llm.context} leaves {most}, where the first {fitting} images fit: "
                "leave others out, or make them smaller"
            )
    raise PromptTooLong(chat.instruction, len(tokens.ids), most)


def _joined(looks: Sequence[Look]) -> dict[str, Tensor]:
    names = looks[0].inputs if looks else ()
    return {name: torch.cat([look.inputs[name] for look in looks]) for name in names}


def num_kept(keep: Bool[Tensor, "b n"]) -> int:
    """The most tokens that are kept of a row, at least one."""
    return max(1, int(keep.sum(1).max()))


def pack(
    states: Sequence[Shaped[Tensor, "b n _"]], keep: Bool[Tensor, "b n"], most: int | None = None
) -> tuple[list[Shaped[Tensor, "b k _"]], Bool[Tensor, "b k"]]:
    """What there is of the kept tokens of each row, in order and from its start on, zeros after them; the
    mask tells them apart. At least one place a row remains. Whoever knows `num_kept` on the CPU gives it as
    `most`, so that nothing waits for a GPU to tell.
    """
    most = num_kept(keep) if most is None else most
    order = keep.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    mask = keep.gather(1, order)
    return [take(state, order).masked_fill(~mask[..., None], 0) for state in states], mask
