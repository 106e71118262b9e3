"""A scene -> captions as people write them, and prompts that carry the facts a detector can check.

The tasks are GenEval's six (arXiv 2310.11513). `single_object` and `two_objects` name shapes alone, so their
texts recur in training; a held-out prompt of the others asks for a combination that training never shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from repfusion.scenes.world import (
    BASE_COLOURS,
    BASE_SHAPES,
    HELD_OUT_PAIRS,
    INVERSE,
    NEW_COLOUR,
    NEW_SHAPE,
    Colour,
    Relation,
    Scene,
    Shape,
    Split,
    Thing,
    WorldConfig,
    draw_scene,
    is_held_out_pair,
)

Task = Literal["single_object", "two_objects", "counting", "colours", "position", "colour_attribution"]
TASKS: tuple[Task, ...] = get_args(Task)
Wording = Literal["plain", "varied"]
"""How facts are put: one word for each thing and relation, or as people write, with synonyms and digits."""
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PREFIXES = (
    *("a photo of ", "a picture of ", "an image of ", "a drawing of ", "an illustration of ", "there is "),
    *("draw ", "please draw ", "paint ", "show me ", "generate ", "make "),
)
ARTICLES = ("a ", "the ", "one ", "")
"""Before a single thing; the first is the plain one."""
JOINTS = ("and", "with", "along with", "as well as")
"""Between two things whose places are left open; the first is the plain one."""
NOUNS: dict[Shape, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
}
ADJECTIVES: dict[Colour, tuple[str, ...]] = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
"""How the first thing stands to the second, between the two."""
RELATION_ENDINGS: dict[Relation, tuple[str, ...]] = {
    "left of": ("on its left", "to its left"),
    "right of": ("on its right", "to its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
"""How a relation is put after both, the second named first: "a blue square with a red circle on its left"."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for: `number` things of a shape, of a colour unless None."""

    shape: Shape
    colour: Colour | None = None
    number: int = 1


@dataclass(frozen=True)
class Prompt:
    """A text and the facts it states; `relation` tells how the first wanted thing stands to the second."""

    text: str
    task: Task
    wanted: tuple[Wanted, ...]
    relation: Relation | None = None

    @property
    def is_new(self) -> bool:
        """Whether it names the new shape or the new colour."""
        return any(want.shape == NEW_SHAPE or want.colour == NEW_COLOUR for want in self.wanted)


def say(
    wanted: Sequence[Wanted], relation: Relation | None = None, rng: np.random.Generator | None = None
) -> str:
    """Facts in words. `rng` draws among the ways in which people put them; None gives the plain one."""
    if rng is None:
        return f" {relation or JOINTS[0]} ".join(map(say_thing, wanted))
    prefix = PREFIXES[rng.integers(len(PREFIXES))] if rng.random() < 0.6 else ""
    if prefix == "there is " and wanted[0].number > 1:
        prefix = "there are "
    things = [say_thing(want, rng) for want in wanted]
    if relation is None:
        return prefix + f" {choose(JOINTS, rng)} ".join(things)
    if rng.random() < 0.15:
        return f"{prefix}{things[1]} with {things[0]} {choose(RELATION_ENDINGS[relation], rng)}"
    verb = "is " if prefix == "" and rng.random() < 0.3 else ""
    return f"{prefix}{things[0]} {verb}{choose(RELATION_PHRASES[relation], rng)} {things[1]}"


def say_thing(want: Wanted, rng: np.random.Generator | None = None) -> str:
    """A wanted thing in words, number or article first: "a red circle", "3 discs"."""
    look = say_look(want.shape, want.colour, rng)
    if want.number == 1:
        return (ARTICLES[0] if rng is None else choose(ARTICLES, rng)) + look
    as_digit = rng is not None and rng.random() < 0.3
    return f"{want.number if as_digit else NUMBERS[want.number]} {plural(look)}"


def say_look(shape: Shape, colour: Colour | None, rng: np.random.Generator | None = None) -> str:
    """A colour, unless it is left out, and a shape: "red circle", "violet disc"."""
    nouns, adjectives = NOUNS[shape], ADJECTIVES[colour] if colour else ("",)
    if rng is None:
        return f"{adjectives[0]} {nouns[0]}".strip()
    return f"{choose(adjectives, rng)} {choose(nouns, rng)}".strip()


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def choose(words: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of several wordings: the first, plain one in three cases of five, else one of the others."""
    return words[0] if len(words) == 1 or rng.random() < 0.6 else words[1 + rng.integers(len(words) - 1)]


def _want(thing: Thing, coloured: bool, number: int = 1) -> Wanted:
    return Wanted(thing.shape, thing.colour if coloured else None, number)


def possible_tasks(scene: Scene) -> tuple[Task, ...]:
    """The tasks whose prompts a scene can satisfy."""
    if len(scene.things) == 1:
        return ("single_object", "colours")
    if scene.is_count:
        return ("counting",)
    return ("two_objects", "colour_attribution", *(("position",) if scene.relation else ()))


def facts_of(scene: Scene, task: Task, coloured: bool = True) -> tuple[tuple[Wanted, ...], Relation | None]:
    """What a prompt of the task states about the scene; colours may be left out where the task is not about
    them.

    Raises:
        ValueError: where the scene cannot satisfy the task.
    """
    if task not in possible_tasks(scene):
        raise ValueError(
            f"a scene of {len(scene.things)} things has no {task} prompt; possible: {possible_tasks(scene)}"
        )
    things = scene.things
    match task:
        case "single_object" | "two_objects":
            return tuple(_want(thing, False) for thing in things), None
        case "colours" | "colour_attribution":
            return tuple(_want(thing, True) for thing in things), None
        case "counting":
            return (_want(things[0], coloured, len(things)),), None
        case "position":
            return tuple(_want(thing, coloured) for thing in things), scene.relation


def write_prompt(
    scene: Scene,
    task: Task,
    rng: np.random.Generator | None = None,
    coloured: bool = True,
    wording: Wording = "varied",
) -> Prompt:
    """A prompt of the task about the scene. `rng` draws the order and, where the wording is varied, among the
    phrasings; None gives the plain one.

    Raises:
        ValueError: where the scene cannot satisfy the task.
    """
    wanted, relation = facts_of(scene, task, coloured)
    if len(wanted) == 2 and rng is not None and rng.random() < 0.5:
        wanted, relation = turned(wanted, relation)
    return Prompt(say(wanted, relation, rng if wording == "varied" else None), task, wanted, relation)


def turned(
    wanted: tuple[Wanted, ...], relation: Relation | None
) -> tuple[tuple[Wanted, ...], Relation | None]:
    """Facts with their things in the other order."""
    return wanted[::-1], INVERSE[relation] if relation else None


def caption_scene(scene: Scene, rng: np.random.Generator, wording: Wording = "varied") -> str:
    """A caption of the scene in one of its phrasings; now and then one that leaves the colour out."""
    tasks = possible_tasks(scene)
    weights = np.array([0.4 if task in ("single_object", "two_objects") else 1.0 for task in tasks])
    task = tasks[rng.choice(len(tasks), p=weights / weights.sum())]
    return write_prompt(scene, task, rng, bool(rng.random() < 0.85), wording).text


def canonical_caption(scene: Scene) -> str:
    """The one canonical caption: everything the scene shows, things in reading order (columns first within a
    row).
    """
    if scene.is_count:
        return write_prompt(scene, "counting").text
    if len(scene.things) == 1:
        return write_prompt(scene, "colours").text
    if scene.relation is None:
        return say([_want(thing, True) for thing in sorted(scene.things, key=lambda thing: thing.y)])
    wanted, relation = facts_of(scene, "position")
    return say(*(turned(wanted, relation) if relation in ("right of", "below") else (wanted, relation)))


def draw_prompts(
    num: int, seed: int = 0, include_new: bool = True, split: Split = "held_out", new_share: float = 0.3
) -> list[Prompt]:
    """`num` prompts, the six tasks in turn, plain wording: about held-out scenes, each new in the one fact
    of its task, or about scenes of the combinations that training shows.

    `include_new` admits the new shape and colour, in `new_share` of the scenes; otherwise only the base's
    vocabulary occurs.
    """
    config = (
        WorldConfig(new_share=new_share)
        if include_new
        else WorldConfig(shapes=BASE_SHAPES, colours=BASE_COLOURS)
    )
    prompts: list[Prompt] = []
    scene_seed = seed * 1_000_003
    while len(prompts) < num:
        task = TASKS[len(prompts) % len(TASKS)]
        scene = draw_scene(scene_seed, config, split)
        scene_seed += 1
        if task in possible_tasks(scene) and (split == "train" or _is_new_by_its_task(scene, task)):
            prompts.append(write_prompt(scene, task))
    return prompts


def _is_new_by_its_task(scene: Scene, task: Task) -> bool:
    """Whether a held-out scene is unseen in the fact the task asks for, and in no other.

    Colours ask for a colour-shape pair that training never shows; number, relation and pairing are of looks
    that it does show. Colour attribution states no relation, so there the pairing itself is held out.
    """
    looks = [(thing.colour, thing.shape) for thing in scene.things]
    has_unseen_look = any(look in HELD_OUT_PAIRS for look in looks)
    match task:
        case "single_object" | "two_objects":
            return True
        case "colours":
            return has_unseen_look
        case "counting" | "position":
            return not has_unseen_look
        case "colour_attribution":
            return not has_unseen_look and is_held_out_pair(looks[0], looks[1])
