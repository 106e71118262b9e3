"""A checkpoint of GILL and images with captions that training did not see -> how often a caption finds its
image among all, and an image its caption, with chance beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from repfusion.config import Config, naming
from repfusion.evaluation.suites.base import Count
from repfusion.evaluation.suites.captions import read_captioned
from repfusion.evaluation.suites.intervals import wilson
from repfusion.evaluation.suites.scenes import facts
from repfusion.images.decode import read_pixels
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.search import rivals
from repfusion.scenes.captions import Prompt, possible_tasks, write_prompt
from repfusion.scenes.detector import check, detect
from repfusion.scenes.world import BASE_COLOURS, BASE_SHAPES, Split, WorldConfig, draw_scene, render, to_uint8

AT = (1, 5, 10)
TRIES = 40
"""Scenes that are drawn for each that is wanted: those that say the same again are left out."""


class RecallConfig(Config):
    """Which captions and images are compared."""

    num: int = Field(default=500, ge=2)
    """Pairs; fewer where there are not so many different captions."""
    seed: int = Field(default=0, ge=0)
    """Decides the scenes."""
    split: Split = "held_out"
    """Scenes of facts that no training image shows, or such as training shows."""
    world: WorldConfig = WorldConfig(shapes=BASE_SHAPES, colours=BASE_COLOURS)
    """The scenes' world; `image_size` is the encoder's."""
    images: Path | None = None
    """Folder of image shards with captions, in the place of scenes."""
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """The samples are those that a training with this share held out; 0 takes all."""
    batch_size: int = Field(default=64, ge=1)
    """Captions, or images, that are read at once."""


@dataclass(frozen=True)
class Pair:
    """A caption and its image; `prompt` is what a scene's caption states."""

    caption: str
    image: UInt8[np.ndarray, "h w 3"]
    prompt: Prompt | None = None


def draw_pairs(config: RecallConfig, image_size: int) -> list[Pair]:
    """Scenes and what is to be said of each, no two captions saying the same."""
    world = config.world.model_copy(update={"image_size": image_size})
    found: dict[object, Pair] = {}
    for number in range(TRIES * config.num):
        scene = draw_scene(config.seed * 1_000_003 + number, world, config.split)
        prompt = write_prompt(scene, possible_tasks(scene)[-1])
        if (stated := facts(prompt)) not in found:
            found[stated] = Pair(prompt.text, to_uint8(render(scene, world)), prompt)
        if len(found) == config.num:
            break
    return list(found.values())


def read_pairs(config: RecallConfig, image_size: int) -> list[Pair]:
    """Held-out samples of a folder of shards, no two with the same caption. Raises ValueError where there are
    none, or an image is of another size than the encoder takes.
    """
    assert config.images is not None
    found: dict[str, Pair] = {}
    for one in read_captioned(config.images, config.held_out_share, config.num):
        with naming(f"{config.images}, key {one.key}"):
            pixels = read_pixels(one.image)
            if pixels.shape[:2] != (image_size, image_size):
                raise ValueError(
                    f"the image is {pixels.shape[1]} x {pixels.shape[0]} px, the encoder takes "
                    f"{image_size} x {image_size}; name the folder that 'curate' wrote"
                )
        found.setdefault(one.caption, Pair(one.caption, pixels))
    return list(found.values())


def measure_recall(reader: GillReader, config: RecallConfig) -> dict[str, Any]:
    """Recall at 1, 5 and 10 of `text_to_image` and `image_to_text`, each with Wilson's 95% interval, and
    `chance`, which is k of as many as there are; what ties with its own counts against it. Of scenes also
    `right`: the share of captions of which the image that is found first is true, by the exact detector,
    beside that of all images.

    Raises:
        ValueError: there are fewer than two pairs, or a caption does not fit into the context.
    """
    size = reader.encoder.image_size
    pairs = draw_pairs(config, size) if config.images is None else read_pairs(config, size)
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} different captions; recall needs at least 2: allow more scenes or images"
        )
    texts, images = _embed(reader, pairs, config.batch_size)
    measured: dict[str, Any] = {
        "num": len(pairs),
        "text_to_image": recalls(rivals(texts, images)),
        "image_to_text": recalls(rivals(images, texts)),
        "chance": {f"recall@{k}": min(k / len(pairs), 1.0) for k in AT},
    }
    if config.images is None:
        measured["right"] = found_right(pairs, (texts @ images.T).argmax(1).tolist())
    return {
        **measured,
        "config": config.model_dump(mode="json"),
        "space": reader.space.model_dump(mode="json"),
    }


def _embed(
    reader: GillReader, pairs: Sequence[Pair], size: int
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "n r"]]:
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    texts = torch.cat([reader.of_prompts([one.caption for one in part]) for part in parts])
    return texts, torch.cat([reader.of_images([one.image for one in part]) for part in parts])


def recalls(num_better: Tensor) -> dict[str, Any]:
    """Shares of queries that fewer than k others beat, and their intervals."""
    counts = {f"recall@{k}": Count(correct=int((num_better < k).sum()), total=len(num_better)) for k in AT}
    shares: dict[str, Any] = {name: count.share for name, count in counts.items()}
    return shares | {"intervals": {name: wilson(count).model_dump() for name, count in counts.items()}}


def found_right(pairs: Sequence[Pair], first: Sequence[int]) -> dict[str, float]:
    """Share of the captions that are true of the image found first, and of the pairs of any image and any
    caption.
    """
    things = [detect(np.moveaxis(one.image, -1, 0).astype(np.float32) / 255) for one in pairs]
    prompts = [one.prompt for one in pairs if one.prompt is not None]
    found = [check(things[place], prompt).correct for prompt, place in zip(prompts, first, strict=True)]
    every = [check(shown, prompt).correct for prompt in prompts for shown in things]
    return {"first": float(np.mean(found)), "chance": float(np.mean(every))}
