"""A scene -> a claim about it, right or wrong in a single fact, that no reader of the text alone can judge.

Whether a claim is right is decided after its kind and before its words, which are drawn alike for both. A
wrong one states what another training scene shows, chosen so that either could have become the other: no
words, and no combination of facts, occur more often in wrong claims than in right ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from repfusion.scenes.captions import Wanted, facts_of, possible_tasks, say, say_look, turned
from repfusion.scenes.world import (
    COLOURS,
    INVERSE,
    SHAPES,
    Relation,
    Scene,
    Split,
    Thing,
    is_held_out,
)

Kind = Literal["colour", "shape", "count", "direction", "axis", "swap", "absence"]
"""The fact that a wrong claim gets wrong: `direction` the opposite side, `axis` beside for above, `swap` the
colours of two things exchanged, `absence` that there is no such thing.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
CROSSWISE: dict[Relation, tuple[Relation, Relation]] = {
    "left of": ("above", "below"),
    "right of": ("above", "below"),
    "above": ("left of", "right of"),
    "below": ("left of", "right of"),
}
ABSENCES = ("no {}", "there is no {}", "an image without a {}", "there is not a {}")

MAX_TRIES = 1_000

Facts = tuple[tuple[Wanted, ...], Relation | None]
"""What a text states: the things, and how the first stands to the second."""


@dataclass(frozen=True)
class SceneClaim:
    """A text about an image, whether it is right, and the fact that it gets wrong if not."""

    text: str
    is_true: bool
    kind: Kind


def possible_kinds(scene: Scene) -> tuple[Kind, ...]:
    """Kinds of claims that can be made about a scene; `absence` needs another scene besides."""
    if scene.is_count:
        return ("colour", "shape", "count", "absence")
    if len(scene.things) == 1:
        return ("colour", "shape", "absence")
    first, second = scene.things
    swap: tuple[Kind, ...] = ("swap",) if first.colour != second.colour else ()
    placed: tuple[Kind, ...] = ("direction", "axis") if scene.relation else ()
    return ("colour", "shape", *swap, *placed, "absence")


def claim(scene: Scene, rng: np.random.Generator, other: Scene, kinds: Sequence[Kind] = KINDS) -> SceneClaim:
    """A claim of one of the kinds that the scene admits; a kind that is named twice is drawn twice as often.
    `other` is a scene drawn as this one was: a claim of absence names a thing of it, or of this one.
    """
    possible = [kind for kind in possible_kinds(scene) for _ in range(kinds.count(kind))]
    if not possible:
        raise ValueError(f"no claim of the kinds {tuple(kinds)} about {scene}")
    for _ in range(MAX_TRIES):
        kind = possible[rng.integers(len(possible))]
        pair = _absences(scene, other, rng) if kind == "absence" else _statements(scene, kind, rng)
        if pair is not None:
            is_true = bool(rng.random() < 0.5)
            return SceneClaim(pair[0] if is_true else pair[1], is_true, kind)
    raise ValueError(f"no claim of the kinds {possible} about {scene} and {other}")


def _absences(scene: Scene, other: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """That a thing of the other scene is missing, which is right, and that one of this scene is."""
    own, others = (sorted({(t.colour, t.shape) for t in s.things}) for s in (scene, other))
    missing = [look for look in others if look not in own]
    if not missing:
        return None
    template = ABSENCES[rng.integers(len(ABSENCES))]
    texts = []
    for looks in (missing, own):
        colour, shape = looks[rng.integers(len(looks))]
        texts.append(template.format(say_look(shape, colour, rng)))
    return texts[0], texts[1]


def _statements(scene: Scene, kind: Kind, rng: np.random.Generator) -> tuple[str, str] | None:
    """What is so, and the same but for one fact of the kind."""
    right = draw_facts(scene, kind, rng)
    wrong = alter(right, kind, rng, "train")
    if wrong is None or is_so(wrong, scene):
        return None
    return say(*right, rng), say(*wrong, rng)


def draw_facts(scene: Scene, kind: Kind, rng: np.random.Generator, always_coloured: bool = False) -> Facts:
    """Facts of the scene among which is one of the kind, the things in either order; colours are left out
    now and then where the kind needs none.
    """
    match kind:
        case "direction" | "axis":
            tasks = ["position"]
        case "colour" | "swap":
            tasks = [task for task in possible_tasks(scene) if task not in ("single_object", "two_objects")]
        case _:
            tasks = list(possible_tasks(scene))
    if always_coloured:
        tasks = [task for task in tasks if task not in ("single_object", "two_objects")]
    task = tasks[rng.integers(len(tasks))]
    coloured = always_coloured or kind in ("colour", "swap") or bool(rng.random() < 0.85)
    wanted, relation = facts_of(scene, task, coloured)
    return turned(wanted, relation) if len(wanted) == 2 and rng.random() < 0.5 else (wanted, relation)


def alter(facts: Facts, kind: Kind, rng: np.random.Generator, split: Split | None) -> Facts | None:
    """The facts with one of the kind changed, such that a scene of the split may show them (of either, where
    it is None); None where there is no such change.

    Of two facts that differ so, each becomes the other with the same probability.
    """
    wanted, relation = facts
    which = int(rng.integers(len(wanted)))
    want = wanted[which]
    options: Sequence[Facts] = ()
    match kind:
        case "colour":
            changed = [replace(want, colour=colour) for colour in COLOURS if colour != want.colour]
            options = [(_with(wanted, which, one), relation) for one in changed]
        case "shape":
            changed = [replace(want, shape=shape) for shape in SHAPES if shape != want.shape]
            options = [(_with(wanted, which, one), relation) for one in changed]
        case "count":
            changed = [replace(want, number=number) for number in (2, 3, 4) if number != want.number]
            options = [(_with(wanted, which, one), relation) for one in changed]
        case "swap":
            colours = [one.colour for one in wanted[::-1]]
            pairs = zip(wanted, colours, strict=True)
            options = [(tuple(replace(one, colour=colour) for one, colour in pairs), relation)]
        case "direction" if relation:
            options = [(wanted, INVERSE[relation])]
        case "axis" if relation:
            options = [(wanted, crosswise) for crosswise in CROSSWISE[relation]]
        case _:
            return None
    options = [option for option in options if is_possible(option, split)]
    return options[rng.integers(len(options))] if options else None


def _with(wanted: tuple[Wanted, ...], which: int, want: Wanted) -> tuple[Wanted, ...]:
    return (*wanted[:which], want, *wanted[which + 1 :])


@lru_cache(2**14)
def is_possible(facts: Facts, split: Split | None) -> bool:
    """Whether a scene of the split may show the facts; where colours are left out, some scene of it does."""
    wanted, relation = facts
    if len({want.shape for want in wanted}) < len(wanted):
        return False
    things = [
        Thing(want.shape, want.colour, 0.5, 0.5, 0.3)
        for want in wanted
        if want.colour is not None
        for _ in range(want.number)
    ]
    if split is None or not things:
        return True
    return is_held_out(Scene(tuple(things), relation)) == (split == "held_out")


def is_so(facts: Facts, scene: Scene) -> bool:
    """Whether the scene shows the facts, numbers exactly."""
    wanted, relation = facts
    found = [
        [t for t in scene.things if t.shape == want.shape and want.colour in (None, t.colour)]
        for want in wanted
    ]
    if len(wanted) == 1:
        return len(found[0]) == wanted[0].number == len(scene.things)
    for first in found[0]:
        for second in found[1]:
            if first is second:
                continue
            own = scene.relation if first is scene.things[0] else scene.relation and INVERSE[scene.relation]
            if relation in (None, own):
                return True
    return False
