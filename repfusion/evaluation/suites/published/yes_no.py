"""Yes-no questions that depend on each other (DPG-Bench, OneIG): answers -> scores, where a question counts
only if those that it depends on are answered with yes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from repfusion.evaluation.judges.questions import QuestionJudge, QuestionJudgeConfig
from repfusion.evaluation.suites.base import Image, Item, Judge
from repfusion.evaluation.suites.published.outputs import Record, judge_each, missing_record

MAX_NEW_TOKENS = 8
"""Tokens of an answer: yes or no, and what a judge puts beside it."""
Zeroing = Literal["ancestors", "in_order", "parents"]
"""Which questions a no takes with it: all that depend on it, directly or not; those too, as far as they come
after it in the file's order; or those alone that depend on it directly.
"""
Dependencies = Mapping[int, Sequence[int]]
"""The questions that each depends on, by number; 0 is none."""


def ask_all(config: QuestionJudgeConfig, device: str, wording: str, skips_black: bool = False) -> Judge:
    """A judge that writes what a model answers to each of an item's `questions`, each put as `wording` has
    it in the place of `{}`; of an image that is black all over, on request, that there is none.
    """
    model = QuestionJudge(config, device)

    def look(item: Item, image: Image) -> Record:
        if skips_black and not image.any():
            return missing_record("black_image", "black all over")
        asked = [wording.format(one["question"]) for one in item.truth["questions"]]
        return {"said": model.written(image, asked, MAX_NEW_TOKENS)}

    return judge_each(look)


def yes_or_no(said: str) -> bool | None:
    """What an answer says, whatever its case and the signs around it; None where it is neither yes nor no."""
    words = re.findall(r"[a-z]+", said.lower())
    return {"yes": True, "no": False}.get(words[0]) if words else None


def zeroed(scores: Mapping[int, float], depends: Dependencies, zeroing: Zeroing) -> dict[int, float]:
    """Scores of questions by number, 0 where a question that it depends on has 0.

    Raises:
        KeyError: a question depends on one that there is not.
    """
    found = dict(scores)
    for number, parents in depends.items():
        read = found if zeroing == "in_order" else scores
        family = _ancestors(number, depends) if zeroing == "ancestors" else [one for one in parents if one]
        if any(read[one] == 0 for one in family):
            found[number] = 0.0
    return found


def _ancestors(number: int, depends: Dependencies) -> set[int]:
    """All questions that one depends on, directly or not."""
    seen: set[int] = set()
    left = [one for one in depends[number] if one]
    while left:
        one = left.pop()
        if one not in seen:
            seen.add(one)
            left += [parent for parent in depends.get(one, ()) if parent]
    return seen


def depends_of(item: Item) -> dict[int, list[int]]:
    """What each question of an item depends on, by number, in the file's order."""
    return {one["number"]: one["depends"] for one in item.truth["questions"]}
