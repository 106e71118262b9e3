"""An image and questions -> what a model that sees writes, or how likely its first words are: any folder that
the one loader of language models reads with eyes (LLaVA, Qwen2.5-VL, Qwen3-VL, InternVL).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from repfusion.config import Config
from repfusion.devices.placing import Precision, precision_of
from repfusion.evaluation.judges.folders import JudgeFolder, version_of
from repfusion.evaluation.suites.base import Image
from repfusion.inputs import to_device
from repfusion.llm.chats.batch import ChatBatch, tokenise_chats
from repfusion.llm.chats.format import Chat
from repfusion.llm.chats.read import read_chats, write
from repfusion.llm.load import load_language_model
from repfusion.pretrained.cache import fetch

DIGITS = 8
"""Decimals of a probability that are kept."""


class QuestionJudgeConfig(Config):
    """The model that sees and answers."""

    folder: JudgeFolder
    """Folder written by save_pretrained, with its tokenizer, chat template and image processor."""
    precision: Literal["auto"] | Precision = "auto"
    """What its weights are held in: `auto` is bfloat16 on a GPU and float32 on a CPU."""
    batch_size: int = Field(default=8, ge=1)
    """Questions answered at once, all about one image."""

    @property
    def version(self) -> str:
        """Names the weights and their precision, which may change an answer by rounding."""
        return f"{self.folder.name} {version_of(self.folder)} {self.precision}"


class FirstWords(NamedTuple):
    """The first token of an answer: the likeliest one, and how likely some beginnings are."""

    said: str
    probabilities: dict[str, tuple[int, str, float]]
    """Token id, its text and its probability of the first token of each text that was asked about."""


class QuestionJudge:
    """A model that answers questions about an image, greedily."""

    def __init__(self, config: QuestionJudgeConfig, device: str):
        self.config, self.device = config, torch.device(device)
        fetch([config.folder])
        precision = precision_of(config.precision, self.device.type == "cuda")
        dtype = getattr(torch, precision)
        self.llm = load_language_model(config.folder, dtype, with_head=True, with_eyes=True).to(self.device)

    def written(
        self, image: Image, questions: Sequence[str], max_new_tokens: int, system: str | None = None
    ) -> list[str]:
        """What the model writes after each question, control tokens left out.

        Raises:
            ValueError: image and question do not fit into the context.
        """
        found = []
        for batch in self._batches(image, questions, max_new_tokens, system):
            writings = write(self.llm, batch, max_new_tokens)
            found += [self.llm.tokenizer.decode(one.ids, skip_special_tokens=True) for one in writings]
        return found

    @torch.no_grad()
    def first_words(
        self, image: Image, questions: Sequence[str], beginnings: Sequence[Sequence[str]]
    ) -> list[FirstWords]:
        """How likely the answer to each question begins with the first token of each of its beginnings.

        Raises:
            ValueError: image and question do not fit into the context.
        """
        found: list[FirstWords] = []
        for batch in self._batches(image, questions, 1, None):
            (states,) = read_chats(self.llm, batch)
            rows = self.llm.logits(states[:, -1:])[:, 0].softmax(-1).cpu().numpy()
            found += [self._words(row, beginnings[len(found) + place]) for place, row in enumerate(rows)]
        return found

    def _words(self, probabilities: np.ndarray, beginnings: Sequence[str]) -> FirstWords:
        decode = self.llm.tokenizer.decode
        firsts = {text: ids[0] for text, ids in zip(beginnings, self.llm.token_ids(beginnings), strict=True)}
        likely = {
            text: (id, decode([id]), round(float(probabilities[id]), DIGITS)) for text, id in firsts.items()
        }
        return FirstWords(decode([int(probabilities.argmax())]), likely)

    def _batches(
        self, image: Image, questions: Sequence[str], room: int, system: str | None
    ) -> Iterator[ChatBatch]:
        for start in range(0, len(questions), self.config.batch_size):
            asked = questions[start : start + self.config.batch_size]
            chats = [Chat(question, (image,), system) for question in asked]
            yield to_device(tokenise_chats(self.llm, chats, room=room), self.device)
