"""Seeds -> training scenes with their pixels and tokenised texts, drawn in random batches.

What a step sees follows from its number alone, so a training that was cut off goes on as if it had not been.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repfusion.files import digest_of, file_sha256
from repfusion.foundation.chunks import Arrays, Kept, in_chunks, joined
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.dialogues import Tokens, text_ids, write_dialogue, write_judgement, write_text
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.scenes.world import draw_scene, render

CHUNK = 500
"""Scenes that one process draws at a time."""
TEXTS = ("dialogues", "judgements", "captions")
"""Kinds of texts that are kept with a scene: dialogues of the first course, of the second, and captions."""


@dataclass(frozen=True)
class Texts:
    """Token ids of each scene's texts, padded on the right, and the place where what is learned begins."""

    ids: Int[Tensor, "s k m"]
    starts: Int[Tensor, "s k"]


@dataclass(frozen=True)
class SceneBatch:
    """Pixels in [0, 1], a dialogue about each image, a text without it, and which of their ids are learned.

    A text without the image is a caption, or a terse prompt with its rewriting.
    """

    pixels: Float[Tensor, "b 3 h w"]
    dialogues: Int[Tensor, "b m"]
    is_answer: Bool[Tensor, "b m"]
    captions: Int[Tensor, "c k"]
    is_caption: Bool[Tensor, "c k"]
    rows: Int[Tensor, " b"]
    """Places of the scenes in the pool."""

    @property
    def texts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.dialogues, self.is_answer, self.captions, self.is_caption


class ScenePool:
    """The training scenes of a configuration, on its device.

    Args:
        config: says how many, and how many texts each.
        tokenizer_folder: whose tokenizer reads the texts.
        num_processes: that draw them; None is one a core.
        kept: folder in which they are kept, and from which they are read; None keeps nothing.
        until: a deadline, in seconds of `time.monotonic`.

    Raises:
        OutOfTime: the deadline came before all were drawn.
    """

    def __init__(
        self,
        config: FoundationConfig,
        tokenizer_folder: Path,
        num_processes: int | None = None,
        kept: Path | None = None,
        until: float | None = None,
    ):
        self.device = torch.device(config.device)
        chunks = [
            (config, tokenizer_folder, start, min(CHUNK, config.num_scenes - start))
            for start in range(0, config.num_scenes, CHUNK)
        ]
        keeping = None if kept is None else Kept(kept, made_from(config, tokenizer_folder))
        parts = in_chunks(draw_chunk, chunks, num_processes, keeping, until)
        tokenizer = load_tokenizer(tokenizer_folder)
        self.pad_id = tokenizer.pad_token_id
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        self.pixels = torch.from_numpy(joined(parts, "pixels")).to(self.device)
        self.dialogues, self.judgements, self.captions = (
            Texts(
                torch.from_numpy(joined(parts, name, self.pad_id)).to(self.device),
                torch.from_numpy(joined(parts, f"{name}_starts")).to(self.device),
            )
            for name in TEXTS
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def generator(self, seed: int, step: int) -> torch.Generator:
        """Random numbers of one step of one part."""
        return torch.Generator(self.device).manual_seed(seed * 10_000_019 + step)

    def batch(
        self, size: int, generator: torch.Generator, dialogues: Texts, num_captions: int | None = None
    ) -> SceneBatch:
        """Scenes at random, one of the dialogues about each, and one caption of each, or of the first few."""

        def draw(most: int) -> Tensor:
            return torch.randint(most, (size,), generator=generator, device=self.device)

        rows, which = draw(len(self)), (draw(dialogues.ids.shape[1]), draw(self.captions.ids.shape[1]))
        asked, is_answer = self._texts(dialogues, rows, which[0])
        first = slice(num_captions)
        captions, is_caption = self._texts(self.captions, rows[first], which[1][first])
        pixels = self.pixels[rows].float() / 255
        return SceneBatch(pixels, asked, is_answer, captions, is_caption, rows)

    def _texts(self, texts: Texts, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and what is learned of them."""
        ids, starts = texts.ids[rows, which].long(), texts.starts[rows, which]
        places = torch.arange(ids.shape[1], device=self.device)
        return ids, (places >= starts[:, None]) & (ids != self.pad_id)


def made_from(config: FoundationConfig, tokenizer_folder: Path) -> str:
    """A digest of all that decides the scenes and their texts."""
    fields = {"num_scenes", "relation_share", "texts_per_scene", "image_size", "patch_size"}
    tokenizer = file_sha256(tokenizer_folder / "tokenizer.json")
    return digest_of([config.model_dump(mode="json", include=fields), tokenizer, CHUNK, TEXTS])


def draw_chunk(config: FoundationConfig, tokenizer_folder: Path, start: int, num: int) -> Arrays:
    """Pixels (uint8) of scenes `start` to `start + num`, ids of their dialogues of both courses and of their
    captions by scene, and the places from which on they are learned.
    """
    torch.set_num_threads(1)
    tokenizer, world = load_tokenizer(tokenizer_folder), config.world
    pixels = np.empty((num, 3, config.image_size, config.image_size), np.uint8)
    dialogues: list[tuple[str, str]] = []
    judgements: list[tuple[str, str]] = []
    captions: list[tuple[str, str]] = []
    for place in range(num):
        seed = start + place
        rng = np.random.default_rng([seed, 7])
        scene = draw_scene(seed, world)
        other = draw_scene(int(rng.integers(config.num_scenes)), world)
        pixels[place] = np.round(render(scene, world) * 255)
        dialogues += [write_dialogue(scene, rng, other, world) for _ in range(config.texts_per_scene)]
        captions += [write_text(scene, rng) for _ in range(config.texts_per_scene)]
        judgements += [write_judgement(scene, rng, other, world) for _ in range(config.texts_per_scene)]
    texts = {
        "dialogues": text_ids(tokenizer, dialogues, config.num_tokens),
        "judgements": text_ids(tokenizer, judgements, config.num_tokens),
        "captions": text_ids(tokenizer, captions),
    }
    return {
        "pixels": pixels,
        **{name: padded(rows, num, tokenizer.pad_token_id) for name, rows in texts.items()},
        **{
            f"{name}_starts": np.array([start for _, start in rows], np.int16).reshape(num, -1)
            for name, rows in texts.items()
        },
    }


def padded(rows: Sequence[Tokens], num_scenes: int, pad_id: int) -> np.ndarray:
    """Ids by scene and text, padded on the right."""
    ids = np.full((len(rows), max(len(text) for text, _ in rows)), pad_id, np.int16)
    for row, (text, _) in zip(ids, rows, strict=True):
        row[: len(text)] = text
    return ids.reshape(num_scenes, -1, ids.shape[1])
