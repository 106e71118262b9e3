"""Colours as prompts, and whether their images are bright: a whole suite in one file. Beside it
`repfusion/evaluation/suites/build.py` gets its configuration in the union and its case in the match.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Scores, Value
from repfusion.request import Request


class BrightnessConfig(Config):
    kind: Literal["brightness"] = "brightness"
    colours: tuple[str, ...] = ("red", "green", "blue")
    """One prompt for each."""
    seen: Literal["mean", "brightest"] = "mean"
    """What the judge tells of an image: the mean of its values, or its highest one, in [0, 1]."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """What an answer has to exceed."""


class BrightnessSuite:
    """Two images of each colour."""

    values = (
        Value("bright", "bright", "headline", meaning="images are bright"),
        Value("mean", "mean brightness", "beside"),
    )
    subject = "colours"
    about = "whose image is *bright*"

    def __init__(self, config: BrightnessConfig):
        self.config = config
        self.judge_version, self.rule_version = f"{config.seen} 1", "above 1"

    def items(self) -> list[Item]:
        colours = self.config.colours
        return [Item(colour, Request(f"a {colour} circle"), num_outputs=2) for colour in colours]

    def judge(self, device: str) -> Judge:
        return self.look

    def look(self, items: Sequence[Item], outputs: Sequence[Sequence[Image]]) -> list[Answer]:
        """Brightness of each image of each item."""
        reduce = np.mean if self.config.seen == "mean" else np.max
        return [[float(reduce(image) / 255) for image in images] for images in outputs]

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        by_item = {
            item.key: float(np.mean([one > self.config.threshold for one in answer]))
            for item, answer in zip(items, answers, strict=True)
        }
        values = {"bright": float(np.mean(list(by_item.values()))), "mean": float(np.mean(answers))}
        return Scores(headline="bright", values=values, by_item=by_item)

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        return {}
