"""A seed -> two pictures of one thing each, and what is asked of both: "the object of image 1 above the
object of image 2".
"""

from dataclasses import dataclass

import numpy as np

from repfusion.scenes.captions import Prompt, Wanted
from repfusion.scenes.world import Scene, Split, Thing, WorldConfig, draw_scene, place

REFERENCE_STREAM = 13
"""Keeps the references' random numbers apart from the scenes'."""


@dataclass(frozen=True)
class Composition:
    """Two scenes of one thing each, and a prompt about an image of both things; its facts name their looks,
    its text does not.
    """

    first: Scene
    second: Scene
    prompt: Prompt


def draw_composition(seed: int, world: WorldConfig, split: Split = "train") -> Composition:
    """The composition of a seed: the things and the relation of a scene of the split, each thing put anew
    into a picture of its own.

    Raises:
        ValueError: where the world allows no relation of the split.
    """
    rng = np.random.default_rng([seed, REFERENCE_STREAM])
    scene = draw_scene(seed, world.model_copy(update={"relation_share": 1.0}), split)
    first, second = (Scene((_put_anew(thing, rng, world),)) for thing in scene.things)
    wanted = tuple(Wanted(thing.shape, thing.colour) for thing in scene.things)
    text = f"the object of image 1 {scene.relation} the object of image 2"
    return Composition(first, second, Prompt(text, "position", wanted, scene.relation))


def _put_anew(thing: Thing, rng: np.random.Generator, world: WorldConfig) -> Thing:
    row, col = divmod(int(rng.integers(world.cells**2)), world.cells)
    return place(rng, thing.shape, thing.colour, row, col, world)
