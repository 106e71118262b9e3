"""Two reference images of one thing each, and what an exact detector sees in the images that compose them ->
whether both things are shown, and stand as was asked.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.suites.base import Answer, Item, Judge, Scores, Value, check_answered
from repfusion.evaluation.suites.edits import first_seed
from repfusion.evaluation.suites.intervals import wilson
from repfusion.evaluation.suites.scenes import (
    count,
    find_things,
    items_of,
    position_floors,
    prompt_of,
    shuffled_partners,
    things_of,
)
from repfusion.request import Request
from repfusion.scenes.captions import Prompt
from repfusion.scenes.detector import check
from repfusion.scenes.references import draw_composition
from repfusion.scenes.world import Split, Thing, WorldConfig, render, to_uint8

SHOWN = 4
"""Compositions in the gallery: each is its two references and its result."""
VALUES = (
    Value("composed", "composed", "headline", meaning="both things, placed as asked"),
    Value("things", "both things", "beside", meaning="both things, wherever they stand"),
    Value("placed_by_chance", "placed by chance", "floor", legend="both things in random cells"),
    Value("shuffled", "shuffled", "floor", legend="against other references"),
)


class ReferencesSuiteConfig(Config):
    kind: Literal["references"] = "references"
    num_compositions: int = Field(default=60, ge=1)
    """Prompts, each with two reference images."""
    split: Split = "held_out"
    """Pairs and relations that no training image shows, or such as training shows."""
    rewrite: str | Literal[False] | None = None
    """System prompt under which a model that rewrites prompts does so, in sight of the references; False:
    it leaves them as they are; None: its own habit.
    """
    world: WorldConfig = WorldConfig()
    """Size of the reference images, shapes, colours and cells."""


class ReferencesSuite:
    """Prompts about the things of two images, judged without any learned part."""

    values: Sequence[Value] = VALUES
    about = (
        "whose image shows the things of both references, in the row or column that the prompt asks for, "
        "checked by an exact detector of shapes and colours; *placed by chance*: both things, in random "
        "cells; *shuffled*: the same images against the references of other prompts"
    )
    judge_version = "detector 2"
    rule_version = "references 1"

    def __init__(self, config: ReferencesSuiteConfig, seed: int):
        self.config, self.seed = config, seed
        self.subject = {
            "held_out": "pairs of references, held out",
            "train": "pairs of references that training shows together",
        }[config.split]

    def items(self) -> list[Item]:
        config, first = self.config, first_seed(self.seed)
        seeds = range(first, first + config.num_compositions)
        drawn = [draw_composition(seed, config.world, config.split) for seed in seeds]
        images = [
            tuple(to_uint8(render(one, config.world)) for one in (pair.first, pair.second)) for pair in drawn
        ]
        items = items_of([one.prompt for one in drawn])
        return [
            Item(item.key, Request(item.request.prompt, own, rewrite=config.rewrite), truth=item.truth)
            for item, own in zip(items, images, strict=True)
        ]

    def judge(self, device: str) -> Judge:
        return find_things

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """Shares of compositions that are right, and that show both things; by chance, and against other
        references. A relation is meant strictly: a diagonal satisfies none.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        check_answered(items, answers)
        prompts, found = [prompt_of(item) for item in items], [things_of(answer) for answer in answers]
        checked = [check(things, one, is_strict=True) for things, one in zip(found, prompts, strict=True)]
        counted = {
            "composed": count([one.correct for one in checked]),
            "things": count([_shows(things, one) for things, one in zip(found, prompts, strict=True)]),
        }
        named = {
            **{name: one.correct / one.total for name, one in counted.items()},
            "placed_by_chance": position_floors(prompts, self.config.world.cells)["strict_position_floor"],
            **self._shuffled(prompts, found),
        }
        return Scores(
            headline="composed",
            values=named,
            counts=counted,
            intervals={name: wilson(one) for name, one in counted.items()},
            by_item={item.key: float(one.correct) for item, one in zip(items, checked, strict=True)},
            reasons={i.key: one.reason for i, one in zip(items, checked, strict=True) if not one.correct},
        )

    def _shuffled(self, prompts: list[Prompt], found: Sequence[list[Thing]]) -> dict[str, float]:
        """The score of images against the prompts of others; nothing where all prompts ask for the same."""
        partners = zip(found, shuffled_partners(prompts, self.seed), strict=True)
        pairs = [(things, prompts[one]) for things, one in partners if one is not None]
        right = [check(things, other, is_strict=True).correct for things, other in pairs]
        return {"shuffled": float(np.mean(right))} if right else {}

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first compositions."""
        return {"references": range(min(SHOWN, len(items)))}


def _shows(things: list[Thing], prompt: Prompt) -> bool:
    """Whether both things are there, wherever they stand."""
    return check(things, Prompt(prompt.text, prompt.task, prompt.wanted)).correct
