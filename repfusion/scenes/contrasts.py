"""A kind of fact -> a claim, an image that bears it out, and one that differs in that fact alone.

Every text has one image for which it is right and one for which it is wrong: whoever reads the text alone is
right in exactly half of the cases. The other way round, a pair of descriptions has one image and two texts.
"""

from dataclasses import dataclass

import numpy as np

from repfusion.scenes.captions import say, say_look
from repfusion.scenes.claims import (
    ABSENCES,
    KINDS,
    Facts,
    Kind,
    alter,
    draw_facts,
    is_possible,
    is_so,
    possible_kinds,
)
from repfusion.scenes.world import Relation, Scene, Split, WorldConfig, draw_scene, place

MAX_TRIES = 10_000
DESCRIBED_KINDS: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "absence")
"""Kinds of fact that captions state; none says what is absent."""


@dataclass(frozen=True)
class Contrast:
    """A claim of a kind, and two scenes: of the first it is right, of the second it is wrong."""

    kind: Kind
    text: str
    right: Scene
    wrong: Scene


def draw_contrast(seed: int, kind: Kind, world: WorldConfig, split: Split) -> Contrast:
    """The contrast of a seed; its facts are such as training shows, or such as are held out from it.

    Raises:
        ValueError: where the world has no such facts.
    """
    rng = np.random.default_rng([seed, 5])
    for _ in range(MAX_TRIES):
        scene = draw_scene(int(rng.integers(2**40)), world, split)
        if kind not in possible_kinds(scene):
            continue
        if kind == "absence":
            other = draw_scene(int(rng.integers(2**40)), world)
            looks = {(thing.colour, thing.shape) for thing in other.things}
            colour, shape = scene.things[0].colour, scene.things[0].shape
            if (colour, shape) in looks:
                continue
            text = ABSENCES[rng.integers(len(ABSENCES))].format(say_look(shape, colour, rng))
            return Contrast(kind, text, other, scene)
        facts = draw_facts(scene, kind, rng, always_coloured=True)
        wrong = alter(facts, kind, rng, None)
        if wrong is None or not is_possible(facts, split) or is_so(wrong, scene):
            continue
        cells = int(rng.integers(2**40))
        right, wrong = (arrange(one, cells, world) for one in (facts, wrong))
        return Contrast(kind, say(*facts, rng), right, wrong)
    raise ValueError(f"no {split} facts of the kind {kind} with shapes {world.shapes} and {world.colours}")


@dataclass(frozen=True)
class Descriptions:
    """A scene and two texts in plain words: a right one, and one that is wrong in a fact of the kind."""

    kind: Kind
    scene: Scene
    right: str
    wrong: str


def draw_descriptions(seed: int, kind: Kind, world: WorldConfig, split: Split = "train") -> Descriptions:
    """The descriptions of a seed, both of facts that scenes of the world and the split may show.

    Raises:
        ValueError: where the world has no such facts.
    """
    rng = np.random.default_rng([seed, 6])
    for _ in range(MAX_TRIES if kind in DESCRIBED_KINDS else 0):
        scene = draw_scene(int(rng.integers(2**40)), world, split)
        if kind not in possible_kinds(scene):
            continue
        facts = draw_facts(scene, kind, rng, always_coloured=True)
        wrong = alter(facts, kind, rng, split)
        if wrong is None or is_so(wrong, scene) or not is_possible(facts, split):
            continue
        if all(want.shape in world.shapes and want.colour in world.colours for want in wrong[0]):
            return Descriptions(kind, scene, say(*facts), say(*wrong))
    raise ValueError(f"no {split} facts of the kind {kind} with shapes {world.shapes} and {world.colours}")


def arrange(facts: Facts, seed: int, world: WorldConfig) -> Scene:
    """A scene that shows the facts, in cells that follow from the seed and the relation alone.

    Raises:
        ValueError: where a thing has no colour.
    """
    wanted, relation = facts
    rng = np.random.default_rng(seed)
    looks = [(want.shape, want.colour) for want in wanted for _ in range(want.number)]
    cells = rng.permutation(world.cells**2)
    spots = [divmod(int(cell), world.cells) for cell in cells]
    if relation is not None:
        spots = list(_related(relation, rng, world.cells))
    things = []
    for (shape, colour), (row, col) in zip(looks, spots, strict=False):
        if colour is None:
            raise ValueError(f"{wanted}: a thing without a colour cannot be drawn")
        things.append(place(rng, shape, colour, row, col, world))
    return Scene(tuple(things), relation)


def _related(
    relation: Relation, rng: np.random.Generator, cells: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Row and column of two cells of which the first stands so to the second."""
    low, high = sorted(rng.choice(cells, 2, replace=False).tolist())
    line = int(rng.integers(cells))
    match relation:
        case "left of":
            return (line, low), (line, high)
        case "right of":
            return (line, high), (line, low)
        case "above":
            return (low, line), (high, line)
        case "below":
            return (high, line), (low, line)
