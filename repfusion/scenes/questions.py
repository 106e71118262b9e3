"""A scene -> a question about it and its answer, one phrase in the plain wording of a canonical caption."""

import numpy as np

from repfusion.scenes.captions import NOUNS, NUMBERS, plural
from repfusion.scenes.world import INVERSE, Relation, Scene, Thing, corner_of


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about colour, shape, number, place, or how two things stand to each other."""
    first = scene.things[int(rng.integers(len(scene.things)))]
    number = len(scene.things)
    questions = [("how many things are there?", NUMBERS[number])]
    if scene.is_count:
        shapes = plural(NOUNS[first.shape][0])
        questions += [(f"how many {shapes} are there?", NUMBERS[number])]
        questions += [(f"what colour are the {shapes}?", first.colour)]
        return questions[int(rng.integers(len(questions)))]
    if sum(thing.shape == first.shape for thing in scene.things) == 1:
        questions += [(f"what colour is the {first.shape}?", first.colour)]
    place = corner_of(first)
    questions += [(f"in which corner is the {first.colour} {first.shape}?", place)]
    questions += [(f"what is at the {place}?", f"a {first.colour} {first.shape}")]
    if scene.relation:
        questions += [ask_where(scene, rng), ask_what(scene, rng)]
    return questions[int(rng.integers(len(questions)))]


def ask_where(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Where one of two things stands, by the other: "left of the blue square"."""
    first, relation, second = _either_way(scene, rng)
    return (
        f"where is the {first.colour} {first.shape}?",
        f"{relation} the {second.colour} {second.shape}",
    )


def ask_what(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """What stands so to the other thing."""
    first, relation, second = _either_way(scene, rng)
    return f"what is {relation} the {second.colour} {second.shape}?", f"a {first.colour} {first.shape}"


def _either_way(scene: Scene, rng: np.random.Generator) -> tuple[Thing, Relation, Thing]:
    relation = scene.relation
    if relation is None:
        raise ValueError(f"{scene} has no two things in a relation to ask about")
    first, second = scene.things
    return (first, relation, second) if rng.random() < 0.5 else (second, INVERSE[relation], first)
