"""A scene -> an instruction that changes it, and the scene that it asks for.

One thing is said to change and nothing else does: what is kept stands where it stood, to the pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar, get_args

import numpy as np

from repfusion.scenes.captions import NUMBERS, Wording, canonical_caption, facts_of, plural, say
from repfusion.scenes.world import (
    INVERSE,
    Scene,
    Shape,
    Split,
    Thing,
    WorldConfig,
    corner_of,
    draw_scene,
    is_held_out,
    place,
    relation_between,
)

EditKind = Literal["recolour", "replace", "remove", "add", "move", "count"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
EVEN: Mapping[EditKind, float] = MappingProxyType(dict.fromkeys(EDIT_KINDS, 1.0))
"""Every kind as often as the others."""
MAX_TRIES = 1_000
TRIES_A_SCENE = 20
"""Edits that are drawn of a scene before another scene is, where there may be one."""
EDIT_STREAM = 11
"""Keeps the edits' random numbers apart from the scenes'."""

RECOLOUR = ("make {} {}", "paint {} {}", "turn {} {}", "change the colour of {} to {}")
REPLACE = ("replace {} with {}", "turn {} into {}", "swap {} for {}")
REMOVE = ("remove {}", "delete {}", "take {} away", "erase {}")
ADD = ("add {}", "put {} into the image", "draw {} too")
ADD_BESIDE = ("add {} {} {}", "put {} {} {}", "draw {} {} {}")
MOVE = ("move {} {} {}", "put {} {} {}", "bring {} {} {}")
MOVE_ALONE = ("move {} to the {}", "put {} in the {}")
COUNT = ("make it {}", "change it to {}", "show {} instead")
MORE, FEWER = ("add {} more", "draw {} more"), ("remove {} of them", "take {} of them away")

T = TypeVar("T")
Cell = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Edit:
    """A scene, what is to be done to it, a scene that shows it done, and all such scenes in words."""

    kind: EditKind
    source: Scene
    instruction: str
    target: Scene
    described: str

    @property
    def kept(self) -> tuple[Thing, ...]:
        """Things that are the same in both."""
        return tuple(thing for thing in self.target.things if thing in self.source.things)


@dataclass(frozen=True)
class Voice:
    """How instructions are put: one of many ways each, or the plain one; either draws the same numbers."""

    rng: np.random.Generator
    wording: Wording

    def one(self, words: Sequence[str]) -> str:
        """One of several ways to say something, of which the first is the plain one."""
        drawn = self.rng.integers(len(words))
        return words[0 if self.wording == "plain" else drawn]

    def names_colours(self) -> bool:
        """Whether a thing that is there is named by its colour too."""
        drawn = self.rng.random()
        return self.wording == "plain" or drawn < 0.6


def possible_edits(scene: Scene) -> tuple[EditKind, ...]:
    """Kinds of edits that a scene admits."""
    if scene.is_count:
        return ("recolour", "replace", "count")
    if len(scene.things) == 1:
        return ("recolour", "replace", "add", "move")
    return ("recolour", "replace", "remove", "move")


def draw_edit(
    scene: Scene,
    rng: np.random.Generator,
    world: WorldConfig,
    kinds: Sequence[EditKind] = EDIT_KINDS,
    split: Split = "train",
    wording: Wording = "varied",
    tries: int = MAX_TRIES,
) -> Edit:
    """An edit of one of the kinds that the scene admits, to a scene of the split.

    Raises:
        ValueError: where none was found in so many tries.
    """
    possible, voice = [kind for kind in possible_edits(scene) if kind in kinds], Voice(rng, wording)
    for _ in range(tries if possible else 0):
        kind = possible[rng.integers(len(possible))]
        instruction, things = _change(kind, scene, voice, world)
        target = _as_scene(things, world)
        is_one_kind = len({(t.shape, t.colour) for t in things}) == 1
        if len(things) == 2 and not is_one_kind and things[0].shape == things[1].shape:
            continue  # two of a shape in two colours are no scene of this world
        if target.things != scene.things and is_held_out(target) == (split == "held_out"):
            return Edit(kind, scene, instruction, target, _describe(kind, instruction, target))
    raise ValueError(f"no {split} edit of the kinds {tuple(kinds)} of {scene}")


def draw_triple(
    seed: int,
    world: WorldConfig,
    kinds: Mapping[EditKind, float] = EVEN,
    split: Split = "train",
    wording: Wording = "varied",
) -> Edit:
    """The edit of a seed: its kind by weight, then a source scene that admits it. In training neither source
    nor target shows what is held out; a held-out target comes from either.

    Raises:
        ValueError: where no kind has a weight, or the world allows no such edit.
    """
    rng, names = np.random.default_rng([seed, EDIT_STREAM]), [kind for kind in EDIT_KINDS if kinds.get(kind)]
    if not names:
        raise ValueError(
            f"kinds of edits {dict(kinds)}: give one of {', '.join(EDIT_KINDS)} a weight above 0"
        )
    weights = np.array([kinds[kind] for kind in names])
    kind = names[rng.choice(len(names), p=weights / weights.sum())]
    for attempt in range(MAX_TRIES):
        of = split if split == "train" or attempt % 2 else "train"
        scene = draw_scene(seed + (attempt << 64), world, of)
        if kind in possible_edits(scene):
            try:
                return draw_edit(scene, rng, world, [kind], split, wording, TRIES_A_SCENE)
            except ValueError:
                continue  # another scene may lead there
    raise ValueError(f"no {split} edit of the kind {kind!r} with {world.shapes} and {world.colours}")


def _change(kind: EditKind, scene: Scene, voice: Voice, world: WorldConfig) -> tuple[str, list[Thing]]:
    """Words, and the things after it; those that stay come as they are."""
    things, rng = list(scene.things), voice.rng
    which = int(rng.integers(len(things)))
    thing = things[which]
    named = _name(scene, which, voice)
    match kind:
        case "recolour":
            colour = _other(world.colours, thing.colour, rng)
            changed = [
                t if t.colour != thing.colour or t.shape != thing.shape else replace(t, colour=colour)
                for t in things
            ]
            return voice.one(RECOLOUR).format(named, colour), changed
        case "replace":
            shape: Shape = _other(world.shapes, thing.shape, rng)
            changed = [t if t.shape != thing.shape else replace(t, shape=shape) for t in things]
            new = f"{thing.colour} {shape}"
            return voice.one(REPLACE).format(named, plural(new) if scene.is_count else f"a {new}"), changed
        case "remove":
            return voice.one(REMOVE).format(named), [t for t in things if t is not thing]
        case "add":
            return _add(thing, named, voice, world)
        case "move":
            return _move(scene, which, named, voice, world)
        case "count":
            return _count(things, voice, world)


def _describe(kind: EditKind, instruction: str, target: Scene) -> str:
    """What the instruction settles: a thing that is added anywhere stands nowhere in particular."""
    if kind == "move" and len(target.things) == 1:
        return f"{canonical_caption(target)} at the {corner_of(target.things[0])}"
    if kind == "add" and not any(relation in instruction for relation in INVERSE):
        return say(facts_of(target, "colour_attribution")[0])
    return canonical_caption(target)


def _add(thing: Thing, named: str, voice: Voice, world: WorldConfig) -> tuple[str, list[Thing]]:
    rng = voice.rng
    shape = _other(world.shapes, thing.shape, rng)
    colour = world.colours[rng.integers(len(world.colours))]
    own, cell = cell_of(thing, world), _free_cell([thing], rng, world)
    added = place(rng, shape, colour, *cell, world)
    relation = relation_between(cell, own)
    if relation is None or rng.random() < 0.3:
        return voice.one(ADD).format(f"a {colour} {shape}"), [thing, added]
    return voice.one(ADD_BESIDE).format(f"a {colour} {shape}", relation, named), [thing, added]


def _move(scene: Scene, which: int, named: str, voice: Voice, world: WorldConfig) -> tuple[str, list[Thing]]:
    """A thing is moved: beside the other thing, or into a corner if it is alone. Nothing moves where a free
    cell lies beside nothing.
    """
    things = list(scene.things)
    thing, others = things[which], things[:which] + things[which + 1 :]
    rng = voice.rng
    cell = _free_cell(things, rng, world)
    moved = place(rng, thing.shape, thing.colour, *cell, world)
    things[which] = moved
    if not others:
        return voice.one(MOVE_ALONE).format(named, corner_of(moved)), things
    relation = relation_between(cell, cell_of(others[0], world))
    if relation is None or relation == relation_between(cell_of(thing, world), cell_of(others[0], world)):
        return "", list(scene.things)
    return voice.one(MOVE).format(named, relation, _name(scene, 1 - which, voice)), things


def _count(things: list[Thing], voice: Voice, world: WorldConfig) -> tuple[str, list[Thing]]:
    rng = voice.rng
    number = _other((2, 3, 4), len(things), rng)
    changed = [things[i] for i in sorted(rng.permutation(len(things))[:number])]
    while len(changed) < number:
        cell = _free_cell(changed, rng, world)
        changed.append(place(rng, things[0].shape, things[0].colour, *cell, world))
    if rng.random() < 0.5:
        looks = f"{things[0].colour} {things[0].shape}"
        return voice.one(COUNT).format(f"{NUMBERS[number]} {plural(looks)}"), changed
    more = number - len(things)
    return voice.one(MORE if more > 0 else FEWER).format(NUMBERS[abs(more)]), changed


def _name(scene: Scene, which: int, voice: Voice) -> str:
    """A thing as an instruction names it: by its look, or by its shape, which no other thing has."""
    thing = scene.things[which]
    look = f"{thing.colour} {thing.shape}" if voice.names_colours() else thing.shape
    return f"the {plural(look) if scene.is_count else look}"


def _as_scene(things: Sequence[Thing], world: WorldConfig) -> Scene:
    """Things with the relation in which two different ones stand."""
    if len(things) != 2 or things[0].shape == things[1].shape:
        return Scene(tuple(things))
    return Scene(tuple(things), relation_between(*(cell_of(thing, world) for thing in things)))


def cell_of(thing: Thing, world: WorldConfig) -> Cell:
    return int(thing.y * world.cells), int(thing.x * world.cells)


def _free_cell(things: Sequence[Thing], rng: np.random.Generator, world: WorldConfig) -> Cell:
    taken = {cell_of(thing, world) for thing in things}
    free = [divmod(i, world.cells) for i in range(world.cells**2) if divmod(i, world.cells) not in taken]
    return free[rng.integers(len(free))]


def _other(options: Sequence[T], own: T, rng: np.random.Generator) -> T:
    others = [option for option in options if option != own]
    return others[rng.integers(len(others))]
