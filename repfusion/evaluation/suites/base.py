"""What an evaluation suite is: items -> a model's outputs -> a judge's answers -> scores, and what people see
of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from pydantic import model_validator

from repfusion.config import Strict
from repfusion.request import Request

Image = UInt8[np.ndarray, "h w 3"]
Answer = Any
"""What JSON holds."""
Judge = Callable[[Sequence["Item"], Sequence[Sequence[Image]]], list[Answer]]
"""Items and the images that each of them got -> an answer for each item."""


@dataclass(frozen=True, eq=False)
class Item:
    """One thing that a model is asked for, and what is true of a right output."""

    key: str
    """Unique within the suite."""
    request: Request
    num_outputs: int = 1
    """Images drawn of it, each from noise of its own."""
    truth: Mapping[str, Any] = field(default_factory=dict)
    """What judge and rule know of a right output, as JSON holds it."""


class Count(Strict):
    """How many of how many were right."""

    correct: int
    total: int

    @property
    def share(self) -> float | None:
        return self.correct / self.total if self.total else None


class Interval(Strict):
    """Limits of a 95% confidence interval."""

    low: float
    high: float


class Scores(Strict):
    """What a rule makes of a judge's answers."""

    headline: str
    """Name of the value that picks the best checkpoint: the higher the better."""
    values: dict[str, float]
    """Shares in [0, 1] by name, and numbers (`Value.is_share`); one that nothing was counted for is left
    out.
    """
    counts: dict[str, Count] = {}
    """What values were counted from, by their names, and further counts."""
    intervals: dict[str, Interval] = {}
    """How far values may be off by the choice of prompts and noise, by their names."""
    by_item: dict[str, float] = {}
    """Share of an item's outputs that are right, by the item's key."""
    reasons: dict[str, str] = {}
    """Why an item's outputs are wrong, by its key."""

    @property
    def headline_value(self) -> float:
        return self.values[self.headline]

    @model_validator(mode="after")
    def _names_are_of_values(self) -> "Scores":
        for what, names in (("headline", [self.headline]), ("interval", self.intervals)):
            for name in names:
                if name not in self.values:
                    raise ValueError(f"{what} {name!r} is none of the values {', '.join(self.values)}")
        return self


Role = Literal["headline", "part", "beside", "floor"]


@dataclass(frozen=True)
class Value:
    """How people see one value of a suite. `part`: a share of the headline, such as a task; `beside`: another
    figure to follow; `floor`: what chance and leniency give.
    """

    name: str
    """Key of the value in `Scores.values`."""
    title: str
    """Heads its column in tables."""
    role: Role
    legend: str = ""
    """Names its curve in charts; empty takes the title."""
    meaning: str = ""
    """What it is a share of, below the number."""
    of: str = ""
    """Key of the part that it stands beside or is the floor of; empty is the headline."""
    is_share: bool = True
    """Whether it lies in [0, 1] and is shown in percent; else it is any number, such as a distance."""

    @property
    def short_name(self) -> str:
        """The name without what groups it: `counting` of `task/counting`."""
        return self.name.rpartition("/")[2]


def check_answered(items: Sequence[Item], answers: Sequence[Answer]) -> None:
    """Raises ValueError where items and answers differ in number, or there are none."""
    if len(items) != len(answers) or not items:
        raise ValueError(f"{len(answers)} answers and {len(items)} items; expected as many, and at least one")


@runtime_checkable
class Suite(Protocol):
    """Items, outputs, answers and scores are columns on disk: a new judge answers anew, a new rule scores
    anew, and neither draws.
    """

    @property
    def values(self) -> Sequence[Value]:
        """The values that it may find, in the order in which they are shown; the headline is among them."""
        ...

    @property
    def subject(self) -> str:
        """What the items are, in words: `held-out prompts`."""
        ...

    @property
    def about(self) -> str:
        """How outputs are judged: goes on after `Percent of 240 held-out prompts`, up to a full stop. Words
        between asterisks are set apart.
        """
        ...

    @property
    def judge_version(self) -> str:
        """Changes with whatever may change an answer."""
        ...

    @property
    def rule_version(self) -> str:
        """Changes with whatever may change a score."""
        ...

    def items(self) -> Sequence[Item]:
        """The items: the same ones at every call, in a fixed order."""
        ...

    def judge(self, device: str) -> Judge:
        """The judge, its weights on a torch device."""
        ...

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """A pure function of items and answers, of the first so many items too."""
        ...

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """Rows of a picture by title: indices of items; none shows all items without titles."""
        ...
