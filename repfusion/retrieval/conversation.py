"""Texts and images in their order -> what the language model of GILL says next, and its states where it calls
for an image.

An image is the few tokens that training shows it as; texts stand behind each other as they are. Keys and
values of what was read are kept, so that each token is read once.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from repfusion.config import Config
from repfusion.retrieval.embedding import GillReader


class SpeakingConfig(Config):
    """How the language model says its next words."""

    max_tokens: int = Field(default=32, ge=0)
    """Most tokens of a reply, beside those that call for an image."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; else scores are divided by it and a token is drawn."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Where tokens are drawn: the fewest likeliest ones whose share is this much."""
    seed: int = Field(default=0, ge=0)
    """Decides which tokens are drawn."""


Ending = Literal["end", "image", "max_tokens", "context"]
"""Why a reply is over: the model ended it, or called for an image; it has as many tokens as it may; the
context is full.
"""


@dataclass(frozen=True)
class Said:
    """What the language model said."""

    text: str
    ending: Ending


class Conversation:
    """What the language model has read and said so far."""

    def __init__(self, reader: GillReader):
        self.reader, self.llm = reader, reader.conditioner.llm
        self.num_image_tokens = len(reader.conditioner.rows)
        self._kept: Any = None
        self._unread: list[Tensor] = []
        self._last: Tensor | None = None
        self.num_shown = 0
        """Images so far."""
        self.used = 0
        """Tokens so far, with the begin token."""
        self._add(self._embed([self.llm.begin_id]))

    @property
    def room(self) -> int:
        """Tokens that still fit, beside those that call for an image."""
        return self.llm.context - self.num_image_tokens - self.used

    def say(self, text: str, place: str) -> None:
        """Reads a text. Raises ValueError, which begins with `place`, where it does not fit."""
        ids = self.llm.token_ids([text])[0]
        self._check_fits(len(ids), place, f"{self.room} tokens of text fit")
        if ids:
            self._add(self._embed(ids))

    @torch.no_grad()
    def show(self, image: UInt8[np.ndarray, "h w 3"], place: str) -> None:
        """Reads an image, its middle square at the encoder's size. Raises ValueError, which begins with
        `place`, where it does not fit.
        """
        num = self.num_visual
        fitting = self.num_shown + max(self.room, 0) // num
        self._check_fits(num, place, f"{fitting} images of {num} tokens each fit beside these texts")
        fitted = middle_square(image, self.reader.encoder.image_size)
        self._add(self.reader.conditioner.see_images(self.reader.latents_of([fitted])))
        self.num_shown += 1

    @property
    def num_visual(self) -> int:
        """Tokens that an image takes."""
        return self.reader.conditioner.see.out_features // self.llm.width

    def _check_fits(self, num: int, place: str, remedy: str) -> None:
        if num > self.room:
            raise ValueError(
                f"{place}: takes {num} tokens, and {max(self.room, 0)} are left: the context of MLLM "
                f"{self.llm.folder} holds {self.llm.context}, of which {self.used} are used and "
                f"{self.num_image_tokens} are kept for an image's call; {remedy}: leave some out"
            )

    def _embed(self, ids: list[int]) -> Float[Tensor, "1 n c"]:
        return self.llm.embed(torch.tensor([ids], device=self.reader.device))

    def _add(self, tokens: Float[Tensor, "1 n c"]) -> None:
        self._unread.append(tokens.to(self.llm.language_model.dtype))
        self.used += tokens.shape[1]

    def _read(self) -> Float[Tensor, "1 n c"]:
        """Last states of what was not read yet."""
        tokens, self._unread = torch.cat(self._unread, dim=1), []
        out = self.llm.language_model(inputs_embeds=tokens, past_key_values=self._kept, use_cache=True)
        self._kept, self._last = out.past_key_values, out.last_hidden_state[:, -1]
        return out.last_hidden_state

    @torch.no_grad()
    def speak(self, config: SpeakingConfig, generator: torch.Generator) -> Said:
        """Says its next words, until it ends, calls for an image, or may say no more."""
        ids: list[int] = []
        while len(ids) < config.max_tokens and self.room > 0:
            chosen = self._next(config, generator)
            if chosen is None or chosen == self.llm.end_id:
                return self._said(ids, "image" if chosen is None else "end")
            ids.append(chosen)
            self._add(self._embed([chosen]))
        if self._next(config, generator) is None:
            return self._said(ids, "image")
        return self._said(ids, "max_tokens" if self.room > 0 else "context")

    def _said(self, ids: list[int], ending: Ending) -> Said:
        return Said(self.llm.tokenizer.decode(ids, skip_special_tokens=True).strip(), ending)

    def _next(self, config: SpeakingConfig, generator: torch.Generator) -> int | None:
        """The next token; None is the first [IMG] token."""
        if self._unread:
            self._read()
        assert self._last is not None
        scores = self.reader.conditioner.next_scores(self._last)[0].cpu()
        chosen = choose(scores, config, generator)
        return None if chosen == len(scores) - 1 else chosen

    @torch.no_grad()
    def call(self) -> Float[Tensor, "k c"]:
        """States at the [IMG] tokens, read after all that was said, on the CPU; they stay in the context."""
        self._add(self.reader.conditioner.image_tokens[None])
        return self._read()[0, -self.num_image_tokens :].float().cpu()


def middle_square(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle square of an image at another size: means of pixels where it shrinks, bicubic where not."""
    shrinks = min(image.shape[:2]) >= side
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(Image.fromarray(image), (side, side), how))


def choose(scores: Float[Tensor, " v"], config: SpeakingConfig, generator: torch.Generator) -> int:
    """The likeliest of the tokens, or one drawn among them."""
    if config.temperature == 0:
        return int(scores.argmax())
    shares, order = (scores / config.temperature).softmax(0).sort(descending=True, stable=True)
    shares = torch.where(shares.cumsum(0) - shares < config.top_p, shares, 0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])
