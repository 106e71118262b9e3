"""Texts about scenes -> the facts they state, and whether a scene bears them out: a reader of the grammar
that shares nothing with what writes it.
"""

import re

from repfusion.scenes.captions import Wanted
from repfusion.scenes.world import COLOURS, SHAPES, Scene, Thing

PREFIX = re.compile(
    r"^(a photo of|a picture of|an image of|a drawing of|an illustration of|there is|there are|draw"
    r"|please draw|paint|show me|generate|make) "
)
PHRASES = {
    "left of": ["to the left of", "on the left of", "on the left side of", "left of"],
    "right of": ["to the right of", "on the right of", "on the right side of", "right of"],
    "above": ["above", "over", "on top of", "higher than"],
    "below": ["below", "under", "beneath", "underneath"],
}
JOINTS = {phrase: relation for relation, phrases in PHRASES.items() for phrase in phrases}
JOINTS |= dict.fromkeys(["and", "with", "along with", "as well as"])
ENDING = re.compile(
    r"^(.+) with (.+) (on its left|to its left|on its right|to its right|above it|over it|below it|under it)$"
)
SIDES = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
NUMBERS = {"a": 1, "the": 1, "one": 1, "two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
SINGULAR = {"disc": "circle", "ball": "circle", "box": "square", "plus": "cross", "rhombus": "diamond"}
SINGULAR |= {shape: shape for shape in SHAPES}
NOUNS = {noun: (shape, 1) for noun, shape in SINGULAR.items()}
NOUNS |= {noun + ("es" if noun[-1] in "sx" else "s"): (shape, 2) for noun, shape in SINGULAR.items()}
HUES = {colour: colour for colour in COLOURS} | {"violet": "purple", "turquoise": "cyan"}


def read_phrase(phrase: str) -> Wanted:
    *before, noun = phrase.split()
    number = NUMBERS[before.pop(0)] if before and before[0] in NUMBERS else 1
    shape, least = NOUNS[noun]
    assert (number > 1) == (least > 1), phrase
    assert len(before) <= 1, phrase
    return Wanted(shape, HUES[before[0]] if before else None, number)


def read(text: str) -> tuple[tuple[Wanted, ...], str | None]:
    """The facts of a text; fails on any text outside the grammar."""
    text = PREFIX.sub("", text)
    if ending := ENDING.match(text):
        second, first, place = ending.groups()
        (side,) = set(place.split()) & SIDES.keys()
        return (read_phrase(first), read_phrase(second)), SIDES[side]
    text = text.replace(" is ", " ")
    joint = max((j for j in JOINTS if f" {j} " in text), key=len, default=None)
    if joint is None:
        return (read_phrase(text),), None
    first, second = text.split(f" {joint} ")
    return (read_phrase(first), read_phrase(second)), JOINTS[joint]


def matching(scene: Scene, want: Wanted) -> list[Thing]:
    return [t for t in scene.things if t.shape == want.shape and want.colour in (None, t.colour)]


def holds(text: str, scene: Scene) -> bool:
    return states(*read(text), scene)


def states(wanted: tuple[Wanted, ...], relation: str | None, scene: Scene) -> bool:
    found = [matching(scene, want) for want in wanted]
    if any(len(things) != want.number for things, want in zip(found, wanted, strict=True)):
        return False
    if relation is None:
        return True
    (a,), (b,) = found
    dx, dy = a.x - b.x, a.y - b.y
    return {
        "left of": dx < -abs(dy),
        "right of": dx > abs(dy),
        "above": dy < -abs(dx),
        "below": dy > abs(dx),
    }[relation]
