"""Prompts over GenEval's six tasks (arXiv 2310.11513), and what an exact detector sees in their images ->
accuracy per task, overall, and against shuffled prompts; position by a stricter rule too, and by chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.suites.base import Answer, Count, Image, Item, Judge, Scores, Value, check_answered
from repfusion.evaluation.suites.intervals import mean_interval, wilson
from repfusion.request import Request
from repfusion.scenes.arrangements import chance_of
from repfusion.scenes.captions import TASKS, Prompt, Task, Wanted, draw_prompts
from repfusion.scenes.detector import check, detect
from repfusion.scenes.rewriting import put_tersely
from repfusion.scenes.world import INVERSE, Split, Thing

GALLERY_COLUMNS = 6
TERSE_STREAM = 17
"""Keeps the random numbers of terse prompts apart from the scenes'."""
TITLES = {task: task.replace("_", " ") for task in TASKS}
VALUES = (
    Value("overall", "overall", "headline", meaning="prompts followed (mean over tasks)"),
    *(Value(f"task/{task}", title, "part") for task, title in TITLES.items()),
    Value("new_concept", "new concept", "beside", meaning="prompts with the new shape or colour"),
    Value("shuffled_overall", "shuffled", "floor", legend="shuffled prompts"),
    Value("strict_position", "strict position", "beside", legend="strict", of="task/position"),
    Value("position_floor", "position by chance", "floor", legend="by chance", of="task/position"),
    Value(
        "strict_position_floor",
        "strict position by chance",
        "floor",
        legend="strict by chance",
        of="task/position",
    ),
)


class ScenesSuiteConfig(Config):
    kind: Literal["scenes"] = "scenes"
    num_prompts: int = Field(default=240, ge=1)
    """The six tasks in turn."""
    split: Split = "held_out"
    """Prompts that each state a fact that no training image shows, or such as training shows."""
    include_new: bool = True
    """Whether prompts may name the new shape and colour."""
    wording: Literal["plain", "terse"] = "plain"
    """How prompts are put: in the plain words of captions, or as people in a hurry write them."""
    rewrite: str | Literal[False] | None = None
    """System prompt under which a model that rewrites prompts is to do so; False: it leaves them as they are;
    None: its own habit.
    """
    cells: int = Field(default=2, ge=2, le=8)
    """Cells along a side of the world's placement grid: where the floors of position put things."""


class ScenesSuite:
    """Prompts about scenes, judged without any learned part."""

    values: Sequence[Value] = VALUES
    about = (
        "that the image satisfies, checked by an exact detector of shapes and colours; *overall* is the mean "
        "over the six tasks, *shuffled* the same images against other prompts of the same task; *strict "
        "position* takes no diagonal for a relation; *by chance*: the things asked for, in random cells"
    )
    judge_version = "detector 2"
    rule_version = "geneval 2"

    def __init__(self, config: ScenesSuiteConfig, seed: int):
        self.config, self.seed = config, seed
        subject = {
            "held_out": "held-out prompts",
            "train": "prompts of combinations that training shows",
        }[config.split]
        self.subject = f"terse {subject}" if config.wording == "terse" else subject

    def items(self) -> list[Item]:
        config = self.config
        prompts = draw_prompts(config.num_prompts, self.seed, config.include_new, config.split)
        if config.wording == "terse":
            rng = np.random.default_rng([self.seed, TERSE_STREAM])
            prompts = [put_tersely(one, rng) for one in prompts]
        return [
            replace(one, request=replace(one.request, rewrite=config.rewrite)) for one in items_of(prompts)
        ]

    def judge(self, device: str) -> Judge:
        return find_things

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """Accuracies of the tasks (`task/...`) and their mean; `shuffled_overall` is that of the same images
        against other prompts of the same task: what chance and leniency give. `strict_position` is position
        without diagonals; `position_floor` and `strict_position_floor` are what both would be if the things
        asked for stood in random cells. Intervals are over prompts, 95%.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        check_answered(items, answers)
        prompts, found = [prompt_of(item) for item in items], [things_of(answer) for answer in answers]
        checked = [check(things, prompt) for things, prompt in zip(found, prompts, strict=True)]
        right = [finding.correct for finding in checked]
        partners = shuffled_partners(prompts, self.seed)
        own = _count_by_task(prompts, right)
        shuffled = _count_by_task(
            prompts,
            [
                None if partner is None else check(things, prompts[partner]).correct
                for things, partner in zip(found, partners, strict=True)
            ],
        )
        new = count([correct for correct, prompt in zip(right, prompts, strict=True) if prompt.is_new])
        pairs = [one for one in zip(prompts, found, strict=True) if one[0].task == "position"]
        strict = count([check(things, prompt, is_strict=True).correct for prompt, things in pairs])
        counted = {
            **{f"task/{task}": one for task, one in own.items()},
            **{name: one for name, one in (("new_concept", new), ("strict_position", strict)) if one.total},
        }
        shares = {name: one.correct / one.total for name, one in counted.items()}
        floors = position_floors([prompt for prompt, _ in pairs], self.config.cells)
        named = {"overall": _mean_share(own), "shuffled_overall": _mean_share(shuffled), **shares, **floors}
        return Scores(
            headline="overall",
            values={value.name: named[value.name] for value in VALUES if value.name in named},
            counts={
                **counted,
                "new_concept": new,
                **{f"shuffled/{task}": one for task, one in shuffled.items()},
            },
            intervals={
                "overall": mean_interval(own.values()),
                **{name: wilson(one) for name, one in counted.items()},
            },
            by_item={item.key: float(correct) for item, correct in zip(items, right, strict=True)},
            reasons={i.key: f.reason for i, f in zip(items, checked, strict=True) if not f.correct},
        )

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """A full row of each task, of different prompts as far as there are."""
        rows: dict[str, list[int]] = {}
        for task in TASKS:
            own = [i for i, item in enumerate(items) if item.truth["task"] == task]
            first = {items[i].request.prompt: i for i in reversed(own)}
            order = sorted(own, key=lambda i: (first[items[i].request.prompt] != i, i))
            rows[TITLES[task]] = order[:GALLERY_COLUMNS]
        return {title: row for title, row in rows.items() if len(row) == GALLERY_COLUMNS}


def items_of(prompts: Sequence[Prompt]) -> list[Item]:
    """Prompts as items, numbered; what they state is their truth."""
    return [
        Item(
            key=f"{number:05d}",
            request=Request(prompt.text),
            truth={
                "task": prompt.task,
                "wanted": [asdict(want) for want in prompt.wanted],
                "relation": prompt.relation,
            },
        )
        for number, prompt in enumerate(prompts)
    ]


def prompt_of(item: Item) -> Prompt:
    """The prompt that `items_of` made an item of."""
    wanted = tuple(Wanted(**want) for want in item.truth["wanted"])
    return Prompt(item.request.prompt, item.truth["task"], wanted, item.truth["relation"])


def find_things(items: Sequence[Item], outputs: Sequence[Sequence[Image]]) -> list[Answer]:
    """The things that each item's image shows, in fractions of its side."""
    return [[asdict(thing) for thing in detect(_pixels(images[0]))] for images in outputs]


def things_of(answer: Answer) -> list[Thing]:
    return [Thing(**thing) for thing in answer]


def _pixels(image: Image) -> Any:
    """RGB in [0, 1], channels first."""
    return np.moveaxis(image, -1, 0).astype(np.float32) / 255


def facts(prompt: Prompt) -> object:
    """What a prompt states, whatever its wording and order; equal facts are met by the same images."""
    if prompt.relation is None:
        return frozenset(prompt.wanted)
    return frozenset([(prompt.wanted, prompt.relation), (prompt.wanted[::-1], INVERSE[prompt.relation])])


def shuffled_partners(prompts: list[Prompt], seed: int) -> list[int | None]:
    """Index, for each prompt, of another of its task with different facts; None where there is none."""
    rng = np.random.default_rng(seed)
    partners: list[int | None] = []
    for prompt in prompts:
        others = [
            index
            for index, other in enumerate(prompts)
            if other.task == prompt.task and facts(other) != facts(prompt)
        ]
        partners.append(others[rng.integers(len(others))] if others else None)
    return partners


def position_floors(prompts: Sequence[Prompt], cells: int) -> dict[str, float]:
    """What prompts of a relation score on average where the things asked for stand in random cells, by either
    rule; nothing without prompts.
    """
    if not prompts:
        return {}
    rules = {"position_floor": False, "strict_position_floor": True}
    return {
        name: float(np.mean([chance_of(prompt, cells, is_strict) for prompt in prompts]))
        for name, is_strict in rules.items()
    }


def count(values: Sequence[bool]) -> Count:
    return Count(correct=sum(values), total=len(values))


def _count_by_task(prompts: Sequence[Prompt], right: Sequence[bool | None]) -> dict[Task, Count]:
    """Counts of the tasks that have any; None in `right` does not count."""
    by_task: dict[Task, list[bool]] = {task: [] for task in TASKS}
    for prompt, correct in zip(prompts, right, strict=True):
        if correct is not None:
            by_task[prompt.task].append(correct)
    return {task: count(values) for task, values in by_task.items() if values}


def _mean_share(counts: Mapping[Task, Count]) -> float:
    """The mean over the tasks' accuracies, as GenEval, not over the prompts."""
    shares = [one.share for one in counts.values() if one.share is not None]
    return float(np.mean(shares)) if shares else 0.0
