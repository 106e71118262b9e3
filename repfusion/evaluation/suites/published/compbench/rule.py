"""T2I-CompBench++'s rules (arXiv 2307.06350): what a judge says of an image -> a score in [0, 1]. `official`
reproduces the published scorers; otherwise what is amiss in them is mended.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from repfusion.evaluation.judges.detections import Box
from repfusion.evaluation.suites.published.outputs import ImageVerdict, Record

PASSES = 0.5
"""Spatial scores below it count as 0."""
NEAR_PX = 150.0
"""Distance of two centres within which things are near, of an image whose shorter side is SEEN_PX."""
SEEN_PX = 479.0
"""Side that the official detector's images are resized to."""
MOST_OVERLAP = 0.1
"""Intersection over union from which on a relation counts less."""
SAME = 0.9
"""Share of overlap, of the union or of either box, beyond which two boxes of a class are one thing."""
DIRECTIONS = {
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}
"""The axis along which a thing lies before (1) or after (-1) the other."""

Thing = Mapping[str, Any]


def check_compbench(
    truth: Mapping[str, Any], record: Record, official: bool, threshold: float
) -> ImageVerdict:
    """The verdict on one image.

    Args:
        truth: an item's: its `category` and what the image has to show.
        record: the judge's: `yes`, a probability for each phrase; or `objects`, things with `box` and `score`
            by class, the surest first, and `size`, width and height of the image in px.
        official: as published, or mended.
        threshold: things that the detector is not surer of are none.
    """
    if "phrases" in truth:
        return _bound(truth["phrases"], record["yes"], official)
    things = {
        name: [one for one in found if one["score"] > threshold] for name, found in record["objects"].items()
    }
    if "relation" in truth:
        return _placed(truth, things, SEEN_PX / min(record["size"]), official)
    return _counted(truth["counts"], things, official)


def _bound(phrases: Sequence[str], yes: Sequence[float], official: bool) -> ImageVerdict:
    """The product over noun phrases; officially of four decimals, to four decimals."""
    score = math.prod(round(one, 4) for one in yes) if official else math.prod(yes)
    doubted = [phrase for phrase, one in zip(phrases, yes, strict=True) if one < PASSES]
    return ImageVerdict(round(score, 4) if official else score, "; ".join(f"no {one}" for one in doubted))


def _placed(
    truth: Mapping[str, Any], things: Mapping[str, Sequence[Thing]], scale: float, official: bool
) -> ImageVerdict:
    """A quarter of how sure the detector is of either thing, and half of how well the relation holds."""
    first, second = truth["things"]
    found = [_at(things, first, 0), _at(things, second, int(first == second and not official))]
    score = sum(0.25 * one["score"] for one in found if one is not None)
    missing = [name for name, one in zip(truth["things"], found, strict=True) if one is None]
    holds = 0.0
    if not missing:
        boxes = [tuple(edge * scale for edge in one["box"]) for one in found if one is not None]
        holds = relation_score(truth["relation"], boxes[0], boxes[1], official)
    score += 0.5 * holds
    reason = "; ".join(f"no {name}" for name in missing)
    if not missing and holds < 1:
        reason = f"{first} {truth['relation']} {second} holds by {holds:.2f}"
    return ImageVerdict(score if score >= PASSES else 0.0, reason)


def _at(things: Mapping[str, Sequence[Thing]], name: str, number: int) -> Thing | None:
    """Thing `number` of a class, the surest first."""
    found = things.get(name, ())
    return found[number] if len(found) > number else None


def relation_score(relation: str, first: Box, second: Box, official: bool) -> float:
    """How well the first thing is in the relation to the second, in [0, 1], of boxes in an image of 479 px.

    Near are things whose centres are within 150 px: officially along either axis, mended along both. On a
    side of the other is what lies further along that axis than along the other one, less so where boxes
    overlap. Officially `on top of` holds of nothing; mended it is `on the top of`.
    """
    ahead = [_middle(second, axis) - _middle(first, axis) for axis in (0, 1)]
    if relation in ("next to", "on side of", "near"):
        distances = [abs(one) for one in ahead]
        within = min(distances) if official else max(distances)
        return 1.0 if within < NEAR_PX else min(1.0, NEAR_PX / max(distances))
    if relation == "on top of" and not official:
        relation = "on the top of"
    if relation not in DIRECTIONS:
        return 0.0
    axis, sign = DIRECTIONS[relation]
    if sign * ahead[axis] <= 0 or abs(ahead[axis]) <= abs(ahead[1 - axis]):
        return 0.0
    shared = _shared(first, second, 0)
    union = _area(first, 0) + _area(second, 0) - shared
    overlap = shared / union if union else 0.0
    return 1.0 if overlap < MOST_OVERLAP else MOST_OVERLAP / overlap


def _counted(
    counts: Sequence[tuple[str, int]], things: Mapping[str, Sequence[Thing]], official: bool
) -> ImageVerdict:
    """Half for each thing that is there, and half for its exact number. Officially things of one class (a boy
    and two girls are persons) are each compared with all of that class; mended, their sum is.
    """
    wanted = [(name, number) for name, number in counts]
    if not official:
        names = dict.fromkeys(name for name, _ in counts)
        wanted = [(one, sum(number for name, number in counts if name == one)) for one in names]
    score, reasons = 0.0, []
    for name, number in wanted:
        seen = len(_apart(things.get(name, ())))
        score += (0.5 * (seen > 0) + 0.5 * (seen == number and seen > 0)) / len(wanted)
        reasons += [] if seen == number else [f"expected {number} {name}, found {seen}"]
    return ImageVerdict(score, "; ".join(reasons))


def _apart(things: Sequence[Thing]) -> list[Thing]:
    """Things of a class without those that an earlier one stands for."""
    kept: list[Thing] = []
    for one in things:
        if not any(_is_same(one["box"], other["box"]) for other in kept):
            kept.append(one)
    return kept


def _is_same(first: Box, second: Box) -> bool:
    """Whether boxes, whose last row and column belong to them, overlap by more than 0.9 of their union or of
    either.
    """
    shared, areas = _shared(first, second, 1), (_area(first, 1), _area(second, 1))
    return any(shared > SAME * one for one in (sum(areas) - shared, *areas))


def _middle(box: Box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def _area(box: Box, more: int) -> float:
    return (box[2] - box[0] + more) * (box[3] - box[1] + more)


def _shared(first: Box, second: Box, more: int) -> float:
    """Area that two boxes have in common."""
    sides = [min(first[i + 2], second[i + 2]) - max(first[i], second[i]) + more for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])
