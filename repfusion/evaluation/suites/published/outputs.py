"""Answers, a record for each image -> verdicts -> shares, counts and intervals. An image that is missing or
broken has a record too, which says so: it is counted, and never vanishes.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repfusion.evaluation.suites.base import Answer, Count, Image, Item, Judge, Scores, Value, check_answered
from repfusion.evaluation.suites.intervals import Stratum, prompts_interval

Record = Mapping[str, Any]
"""What a judge says of one image, as JSON holds it."""
MISSING = "missing"
"""Key of a record without an answer: why there is no image."""
GALLERY_ITEMS = 24
JUDGED = Value("judged", "judged", "beside", meaning="images that could be judged")
UNEXPECTED = Value(
    "unexpected_answers",
    "unexpected answers",
    "beside",
    meaning="answers of the judge that it may not give; they count as wrong",
)
BESIDE = (JUDGED, UNEXPECTED)
"""Values of every published suite."""


@dataclass(frozen=True)
class ImageVerdict:
    """What a rule says of one image."""

    score: float
    """A share in [0, 1]."""
    reason: str = ""
    """Why it is not 1, in words."""
    missing: str | None = None
    """Why there is no image."""
    num_answers: int = 0
    """Answers that the judge gave, where it answers in words."""
    num_unexpected: int = 0
    """How many are none of the answers that it may give."""

    @property
    def is_judged(self) -> bool:
        """Whether there was an image."""
        return self.missing is None


Verdicts = Sequence[Sequence[ImageVerdict]]
"""A verdict for each image of each item."""
Rule = Callable[[Item, Record], ImageVerdict]


def judge_each(look: Callable[[Item, Image], Record]) -> Judge:
    """A judge that looks at each image by itself: it answers an item with a record for each image."""

    def judge(items: Sequence[Item], outputs: Sequence[Sequence[Image]]) -> list[Answer]:
        pairs = zip(items, outputs, strict=True)
        return [[look(item, image) for image in images] for item, images in pairs]

    return judge


def missing_record(reason: str, detail: str) -> Record:
    """The record of an image that is not there or cannot be read."""
    return {MISSING: reason, "detail": detail}


def verdicts_of(items: Sequence[Item], answers: Sequence[Answer], rule: Rule) -> list[list[ImageVerdict]]:
    """A verdict for each image of each item; one that is missing scores 0.

    Raises:
        ValueError: items and answers differ in number, or an item has another number of records than images.
    """
    check_answered(items, answers)
    found = []
    for item, records in zip(items, answers, strict=True):
        if len(records) != item.num_outputs:
            raise ValueError(
                f"item {item.key}: {len(records)} answers; expected {item.num_outputs}, one an image"
            )
        found.append([_verdict(item, record, rule) for record in records])
    return found


def _verdict(item: Item, record: Record, rule: Rule) -> ImageVerdict:
    if MISSING in record:
        return ImageVerdict(0.0, f"{record[MISSING]}: {record['detail']}", missing=record[MISSING])
    return rule(item, record)


@dataclass(frozen=True)
class Judged:
    """An item's verdicts that count towards a score: all, or those of images that there are."""

    item: Item
    verdicts: Sequence[ImageVerdict]

    @property
    def score(self) -> float:
        """The mean over images."""
        return float(np.mean([one.score for one in self.verdicts]))


def judged(items: Sequence[Item], verdicts: Verdicts, drops_missing: bool) -> list[Judged]:
    """The items with what counts of their verdicts; those of which nothing does are left out."""
    pairs = zip(items, verdicts, strict=True)
    kept = [Judged(item, [v for v in own if v.is_judged or not drops_missing]) for item, own in pairs]
    return [one for one in kept if one.verdicts]


def scores_of(
    headline: str,
    values: Mapping[str, float],
    items: Sequence[Item],
    verdicts: Verdicts,
    strata: Mapping[str, Sequence[Stratum]],
    counts: Mapping[str, Count] = {},
) -> Scores:
    """What people see of verdicts, with what could not be judged.

    Args:
        headline: name of the value that picks the best checkpoint.
        values: the suite's own values; those that are not finite, of nothing, are left out.
        items: all items.
        verdicts: all verdicts, of missing images too.
        strata: weights and scores of prompts by the name of the value that is made of them, for the
            intervals.
        counts: the suite's own counts.
    """
    everything = [one for own in verdicts for one in own]
    beside = _beside(everything)
    shares = {name: one.share for name, one in beside.items() if name in ("judged", "unexpected_answers")}
    found = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    reasons = {i.key: _reasons(own) for i, own in zip(items, verdicts, strict=True) if _reasons(own)}
    return Scores(
        headline=headline,
        values={headline: 0.0} | found | {name: share for name, share in shares.items() if share is not None},
        counts={**counts, **beside},
        intervals={name: prompts_interval(own) for name, own in strata.items() if name in found},
        by_item={
            i.key: float(np.mean([v.score for v in own])) for i, own in zip(items, verdicts, strict=True)
        },
        reasons=reasons,
    )


def _beside(verdicts: Sequence[ImageVerdict]) -> dict[str, Count]:
    total = len(verdicts)
    why = Counter(one.missing for one in verdicts if one.missing is not None)
    answers = sum(one.num_answers for one in verdicts)
    unexpected = sum(one.num_unexpected for one in verdicts)
    return {
        "judged": Count(correct=total - why.total(), total=total),
        **{f"missing/{reason}": Count(correct=number, total=total) for reason, number in sorted(why.items())},
        **({"unexpected_answers": Count(correct=unexpected, total=answers)} if answers else {}),
    }


def _reasons(verdicts: Sequence[ImageVerdict]) -> str:
    return "; ".join(dict.fromkeys(one.reason for one in verdicts if one.reason))


def first_items(items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
    """A gallery of the first items."""
    return {"": range(min(GALLERY_ITEMS, len(items)))}


def alone(scores: Sequence[float]) -> list[Stratum]:
    """Scores of prompts whose mean is a value."""
    return [(1.0, scores)]


def mean(values: Sequence[float]) -> float:
    """The mean; NaN, which `scores_of` leaves out, of none."""
    return float(np.mean(values)) if len(values) else float("nan")
