"""Chats read and answered: hidden states of several layers at all tokens, and greedy decoding of a whole
batch with keys and values kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repfusion.llm.base import LAST, LanguageModel, states_of
from repfusion.llm.chats.batch import ChatBatch
from repfusion.llm.chats.format import ChatPart
from repfusion.pretrained.config import read_json

GENERATION_CONFIG = "generation_config.json"


class Writing(NamedTuple):
    """What a language model wrote after a chat."""

    ids: list[int]
    """Token ids, the end token left out."""
    ended: bool
    """Whether the end token came; else it would have gone on."""


def read_chats(
    llm: LanguageModel,
    batch: ChatBatch,
    layers: Sequence[int] = LAST,
    after: Float[Tensor, "b q c"] | None = None,
) -> tuple[Float[Tensor, "b _ c"], ...]:
    """Hidden states of chats in several layers, as transformers counts them: 0 are the embeddings, -1 the
    last layer's after the final norm; then those of the tokens `after` each chat, where there are some. What
    they are in padding means nothing.

    Raises:
        ValueError: a layer lies beyond the model's; tokens follow images of which the model reads more than
            tokens.
    """
    num_layers = len(llm.layers)
    for layer in layers:
        if not -num_layers - 1 <= layer <= num_layers:
            raise ValueError(
                f"hidden state {layer} of MLLM {llm.folder}: it has {num_layers} layers; expected 0 to "
                f"{num_layers}, or -1 to {-num_layers - 1} from the last"
            )
    is_last = tuple(layers) == LAST
    return states_of(_run(llm, batch, after, use_cache=False, output_hidden_states=not is_last), layers)


def _run(
    llm: LanguageModel, batch: ChatBatch, after: Float[Tensor, "b q c"] | None = None, **options: Any
) -> Any:
    """The language model over a batch, image tokens in the place of their marks, and the tokens after it."""
    embeds, more = llm.embed(batch.ids), {}
    if batch.images:
        assert llm.eyes is not None
        is_image = batch.is_any(ChatPart.IMAGE)
        tokens, more = llm.eyes.see(batch.images, is_image)
        embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
    mask, positions = batch.mask.long(), batch.positions
    if after is not None:
        if more:
            raise ValueError(
                f"MLLM {llm.folder}: of images it reads {', '.join(more)} beside tokens, after which no "
                "others can follow; use a LLaVA, a Qwen2.5-VL or an InternVL"
            )
        embeds = torch.cat([embeds, after.to(embeds.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(after.shape[:2])], dim=1)
        numbers = torch.arange(after.shape[1], device=mask.device)
        following = next_position(positions) + numbers
        positions = torch.cat([positions, following.expand(*positions.shape[:-1], -1)], dim=-1)
    return llm.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **more, **options
    )


def next_position(positions: Int[Tensor, "*axes b n"]) -> Int[Tensor, "b 1"]:
    """The position of what follows each row."""
    axes = [axis for axis in range(positions.ndim) if axis != positions.ndim - 2]
    return positions.amax(axes)[:, None] + 1


@torch.no_grad()
def write(llm: LanguageModel, batch: ChatBatch, max_new_tokens: int) -> list[Writing]:
    """The likeliest next tokens after each chat, one at a time, until an end token. The model has to be
    loaded with its head.

    Raises:
        ValueError: the context does not hold so many tokens after the longest chat.
    """
    width = batch.ids.shape[1]
    if width + max_new_tokens > llm.context:
        raise ValueError(
            f"the longest chat has {width} tokens; the context of MLLM {llm.folder} holds {llm.context}, so "
            f"{llm.context - width} can be written, not {max_new_tokens}: shorten the chat, or write less"
        )
    ends = torch.tensor(end_ids(llm), device=batch.ids.device)
    columns = _decode(llm, batch, max_new_tokens, ends)
    rows = torch.stack(columns, dim=1) if columns else batch.ids.new_empty(len(batch.ids), 0)
    has_ended = torch.isin(rows, ends)
    lengths = (has_ended.cumsum(1) == 0).sum(1).tolist()
    return [
        Writing(row[:length], length < len(row)) for row, length in zip(rows.tolist(), lengths, strict=True)
    ]


def _decode(llm: LanguageModel, batch: ChatBatch, max_new_tokens: int, ends: Tensor) -> list[Tensor]:
    """The tokens [b] of each step. Rows that have ended go on with the others, and nobody reads them."""
    out = _run(llm, batch, use_cache=True)
    mask, columns = batch.mask.long(), []
    is_writing = torch.ones_like(batch.ids[:, 0], dtype=torch.bool)
    position = next_position(batch.positions)
    while len(columns) < max_new_tokens:
        columns.append(llm.logits(out.last_hidden_state[:, -1:])[:, 0].argmax(-1))
        is_writing &= ~torch.isin(columns[-1], ends)
        if len(columns) == max_new_tokens or not is_writing.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = llm.language_model(
            input_ids=columns[-1][:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        position = position + 1
    return columns


def end_ids(llm: LanguageModel) -> list[int]:
    """Tokens that end an answer: those of the folder's generation_config.json, and the tokenizer's."""
    path = llm.folder / GENERATION_CONFIG
    named = read_json(path, "MLLM").get("eos_token_id") if path.is_file() else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({*ids, llm.end_id})
