"""GenEval's rule (arXiv 2310.11513): what a detector found, and colours -> whether an image shows what its
prompt asks for. `official` reproduces the published scorer; otherwise what is amiss in it is mended.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from repfusion.evaluation.judges.colours import COLOURS
from repfusion.evaluation.judges.detections import Box, overlap
from repfusion.evaluation.suites.published.outputs import ImageVerdict, Record

THRESHOLD = 0.3
"""Things that the detector is surer of count."""
COUNTING_THRESHOLD = 0.9
"""Things that it has to be surer of in the task of counting."""
MAX_OBJECTS = 16
"""Things of a class that are looked at, the surest."""
MARGIN = 0.1
"""Share of two things' sizes, summed, that they may be apart along an axis without a relation."""
DIRECTION = 0.5
"""Part of the unit direction along an axis beyond which a relation holds."""
NEAR_PX = 1e-3
"""Offsets below it are none."""


class GenEvalRule(NamedTuple):
    """How a record is judged."""

    official: bool
    max_overlap: float
    """Intersection over union from which on the less sure of two things of a class is left out; 1 is off."""


class _Seen(NamedTuple):
    box: Box
    score: float
    colour: str | None


def check_image(truth: Mapping[str, Any], record: Record, rule: GenEvalRule) -> ImageVerdict:
    """The verdict on one image.

    Args:
        truth: an item's: its `tag`, what it has to `include`, and `exclude`.
        record: the judge's: by class, things with `box`, `score` and, where it was looked at, `colours`, the
            cosines to the ten colours.
        rule: official or mended.
    """
    reasons: list[str] = []
    matched: list[list[_Seen] | None] = []
    for wanted in truth["include"]:
        things = _kept(record["objects"].get(wanted["class"], ()), truth["tag"], rule)[: wanted["count"]]
        wrong = _wrong(wanted, things, matched, rule)
        reasons += wrong
        matched.append(None if wrong else things)
    for unwanted in truth["exclude"]:
        number = len(_kept(record["objects"].get(unwanted["class"], ()), truth["tag"], rule))
        if number >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    return ImageVerdict(float(not reasons), "; ".join(reasons))


def _kept(found: Sequence[Mapping[str, Any]], tag: str, rule: GenEvalRule) -> list[_Seen]:
    """The things of a class that count, the surest first. Of things that the detector is as sure of, the
    official scorer takes them as NumPy's unstable sort leaves them; the mended rule the first one first.
    """
    scores = np.array([thing["score"] for thing in found], np.float32)
    order = np.argsort(scores)[::-1] if rule.official else np.argsort(-scores, kind="stable")
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    sure = [int(place) for place in order if scores[place] > threshold][:MAX_OBJECTS]
    kept: list[_Seen] = []
    for place in sure:
        seen = _seen(found[place])
        if rule.max_overlap == 1 or all(overlap(one.box, seen.box) < rule.max_overlap for one in kept):
            kept.append(seen)
    return kept


def _seen(thing: Mapping[str, Any]) -> _Seen:
    cosines = thing.get("colours")
    colour = None if cosines is None else COLOURS[int(np.argmax(cosines))]
    left, top, right, bottom = thing["box"]
    return _Seen((left, top, right, bottom), thing["score"], colour)


def _wrong(
    wanted: Mapping[str, Any], things: list[_Seen], matched: list[list[_Seen] | None], rule: GenEvalRule
) -> list[str]:
    """What is wrong about one thing that is asked for; things are as many as that at most, the surest."""
    name, number = wanted["class"], wanted["count"]
    if len(things) < number:
        return [f"expected {name}>={number}, found {len(things)}"]
    reasons = []
    if (colour := wanted.get("color")) is not None:
        colours = Counter(one.colour for one in things)
        if colours[colour] < number:
            shown = ", ".join(f"{colours[one]} {one}" for one in COLOURS if colours[one])
            reasons.append(f"expected {colour} {name}>={number}, found {shown or 'no colour'}")
    if (position := wanted.get("position")) is not None and not reasons:
        reasons += _misplaced(name, things, *position, matched, rule)
    return reasons


def _misplaced(
    name: str,
    things: list[_Seen],
    relation: str,
    target: int,
    matched: list[list[_Seen] | None],
    rule: GenEvalRule,
) -> list[str]:
    """The first pair of a thing and a target that is not in the relation: every pair has to be."""
    targets = matched[target]
    if targets is None:
        return [f"no target for {name} to be {relation}"]
    for thing in things:
        for other in targets:
            found = relations(thing.box, other.box, rule.official)
            if relation not in found:
                said = " and ".join(sorted(found)) or "nowhere near"
                return [f"expected {name} {relation} target, found {said} target"]
    return []


def relations(first: Box, second: Box, official: bool) -> set[str]:
    """Where the first thing is, seen from the second; none where their centres are hardly apart.

    Along each axis a tenth of both sizes is taken off the offset. The direction is the rest over the length
    of the whole offset, officially, so that a thing that is beyond the margin may be nowhere; mended, over
    the length of the rest.
    """
    (a, b), boxes = (0, 1), np.array([first, second], float).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[a] - centres[b]
    rest = np.maximum(np.abs(offset) - MARGIN * (sizes[a] + sizes[b]), 0) * np.sign(offset)
    if np.all(np.abs(rest) < NEAR_PX):
        return set()
    x, y = rest / np.linalg.norm(offset if official else rest)
    named = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, part in named.items() if part > DIRECTION}
