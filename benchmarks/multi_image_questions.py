"""Questions about one of two images, answered by a frozen model that sees from all of their tokens and from
selected ones (MaVEn, arXiv 2408.12321, asks so); `benchmarks/multi_image_questions.py`.

Two scenes of different shapes stand before a question about a shape that only one of them shows, so that the
right image has to be found first: `what colour is the circle?`. The selection is of each image, as MaVEn's,
by what the question is about; its scorer is not learned here: it is the cosine of a token's hidden state and
the mean of the question's. Beside it stand as many tokens that chance keeps, no token at all (what the
question alone tells), and the same question about its image alone. The last line is JSON.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from repfusion.evaluation.suites.base import Count
from repfusion.evaluation.suites.intervals import wilson
from repfusion.inputs import to_device
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import ChatBatch, tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import read_chats, write
from repfusion.llm.load import load_language_model
from repfusion.scenes.world import (
    BASE_COLOURS,
    BASE_SHAPES,
    Scene,
    Split,
    WorldConfig,
    draw_scene,
    render,
    to_uint8,
)
from repfusion.weights import WEIGHTS

MOST_WORDS = 8
"""Tokens of an answer."""


class TwoImageQuestion(NamedTuple):
    """A question about one of two images."""

    images: tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]
    about: int
    """The image that it is about."""
    text: str
    answer: str


@dataclass(frozen=True)
class KeptChats(ChatBatch):
    """Chats of which only some tokens are seen; all keep their positions."""

    keep: Bool[Tensor, "b n"]

    @property
    def mask(self) -> Bool[Tensor, "b n"]:
        return (self.parts != ChatPart.PADDING) & self.keep


def draw_questions(num: int, seed: int, split: Split) -> list[TwoImageQuestion]:
    """Questions about scenes of one thing each or of several, half of them about either image."""
    rng = np.random.default_rng(seed)
    world = WorldConfig(shapes=BASE_SHAPES, colours=BASE_COLOURS)
    found: list[TwoImageQuestion] = []
    number = seed * 1_000_003
    while len(found) < num:
        pair = tuple(draw_scene(number + place, world, split) for place in range(2))
        number += 2
        about = len(found) % 2
        elsewhere = {thing.shape for thing in pair[1 - about].things}
        shapes = [shape for shape in looks(pair[about]) if shape not in elsewhere]
        if shapes:
            shape = shapes[int(rng.integers(len(shapes)))]
            images = tuple(to_uint8(render(scene, world)) for scene in pair)
            asked = f"what colour is the {shape}?"
            found.append(TwoImageQuestion((images[0], images[1]), about, asked, looks(pair[about])[shape]))
    return found


def looks(scene: Scene) -> dict[str, str]:
    """Colours of the shapes that a scene shows once."""
    shapes = [thing.shape for thing in scene.things]
    return {thing.shape: thing.colour for thing in scene.things if shapes.count(thing.shape) == 1}


Keep = Callable[[LanguageModel, ChatBatch], Bool[Tensor, "b n"]]


def all_tokens(llm: LanguageModel, batch: ChatBatch) -> Bool[Tensor, "b n"]:
    """Every token."""
    return torch.ones_like(batch.mask)


def no_tokens(llm: LanguageModel, batch: ChatBatch) -> Bool[Tensor, "b n"]:
    """No token of an image."""
    return batch.parts != ChatPart.IMAGE


def by_scores(batch: ChatBatch, scores: Tensor, share: float) -> Bool[Tensor, "b n"]:
    """All but image tokens, and of each image the share of the highest scores."""
    keep = batch.parts != ChatPart.IMAGE
    for row, image_of in enumerate(batch.image_of):
        for image in range(int(image_of.max()) + 1):
            places = (image_of == image).nonzero()[:, 0]
            kept = scores[row, places].topk(math.ceil(share * len(places))).indices
            keep[row, places[kept]] = True
    return keep


def at_random(share: float) -> Keep:
    """Chance keeps as many tokens as are selected."""
    generator = torch.Generator().manual_seed(0)

    def keep(llm: LanguageModel, batch: ChatBatch) -> Bool[Tensor, "b n"]:
        scores = torch.rand(batch.ids.shape, generator=generator)
        return by_scores(batch, scores.to(batch.ids.device), share)

    return keep


def by_question(share: float, layer: int) -> Keep:
    """The tokens whose hidden states lie nearest to the mean of the question's."""

    @torch.no_grad()
    def keep(llm: LanguageModel, batch: ChatBatch) -> Bool[Tensor, "b n"]:
        (states,) = read_chats(llm, batch, (layer,))
        is_text = batch.is_any(ChatPart.INSTRUCTION)[..., None].to(states.dtype)
        mean = (states * is_text).sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1)
        return by_scores(batch, torch.cosine_similarity(states, mean, dim=-1), share)

    return keep


def answers(
    llm: LanguageModel, chats: Sequence[Chat], keep: Keep, device: torch.device, size: int
) -> list[str]:
    """What the model writes after each chat."""
    found = []
    for start in range(0, len(chats), size):
        batch = to_device(tokenise_chats(llm, chats[start : start + size], room=MOST_WORDS), device)
        own = {field.name: getattr(batch, field.name) for field in fields(batch)}
        kept = KeptChats(**own, keep=keep(llm, batch))
        found += [
            llm.tokenizer.decode(one.ids, skip_special_tokens=True).strip()
            for one in write(llm, kept, MOST_WORDS)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=WEIGHTS / "llava", help="a model that sees")
    parser.add_argument("--num", type=int, default=200, help="questions")
    parser.add_argument("--share", type=float, default=0.25, help="of each image's tokens that is kept")
    parser.add_argument("--layer", type=int, default=-1, help="hidden state by which tokens are selected")
    parser.add_argument("--split", choices=["train", "held_out"], default="train")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    llm = load_language_model(args.folder, torch.float32, with_head=True, with_eyes=True).to(device)
    questions = draw_questions(args.num, args.seed, args.split)
    two = [Chat(one.text, one.images) for one in questions]
    alone = [Chat(one.text, (one.images[one.about],)) for one in questions]
    ways: dict[str, tuple[Sequence[Chat], Keep]] = {
        "two images, all tokens": (two, all_tokens),
        "two images, selected": (two, by_question(args.share, args.layer)),
        "two images, by chance": (two, at_random(args.share)),
        "no image token": (two, no_tokens),
        "its image alone": (alone, all_tokens),
    }
    result: dict[str, object] = {"num": len(questions), "share": args.share, "split": args.split}
    for name, (chats, keep) in ways.items():
        said = answers(llm, chats, keep, device, args.batch_size)
        right = [text == one.answer for text, one in zip(said, questions, strict=True)]
        count = Count(correct=sum(right), total=len(right))
        second = [one for one, question in zip(right, questions, strict=True) if question.about == 1]
        interval = wilson(count)
        print(f"{name:24} {count.share:.3f} ({interval.low:.3f} to {interval.high:.3f})", flush=True)
        result[name] = {
            "accuracy": count.share,
            "about the second": float(np.mean(second)),
            **interval.model_dump(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
