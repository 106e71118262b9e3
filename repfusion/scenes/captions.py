"""A scene -> captions, questions with answers, and prompts that carry the facts a detector can check.

The tasks are GenEval's six (arXiv 2310.11513). `single_object` and `two_objects` name shapes alone, so their
texts recur in training; a held-out prompt of the others asks for a combination that training never shows.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from repfusion.scenes.world import (
    BASE_COLOURS,
    BASE_SHAPES,
    COLOURS,
    HELD_OUT_PAIRS,
    INVERSE,
    NEW_COLOUR,
    NEW_SHAPE,
    SHAPES,
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
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ", "draw ")
RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}


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


def _noun(shape: str, number: int) -> str:
    if number == 1:
        return shape
    return shape + ("es" if shape == "cross" else "s")


def _phrase(want: Wanted) -> str:
    words = [*([want.colour] if want.colour else []), _noun(want.shape, want.number)]
    return " ".join([NUMBERS[want.number] if want.number > 1 else "a", *words])


def _want(thing: Thing, coloured: bool, number: int = 1) -> Wanted:
    return Wanted(thing.shape, thing.colour if coloured else None, number)


def possible_tasks(scene: Scene) -> tuple[Task, ...]:
    """The tasks whose prompts a scene can satisfy."""
    if len(scene.things) == 1:
        return ("single_object", "colours")
    if scene.is_count:
        return ("counting",)
    return ("two_objects", "colour_attribution", *(("position",) if scene.relation else ()))


def write_prompt(
    scene: Scene, task: Task, rng: np.random.Generator | None = None, coloured: bool = True
) -> Prompt:
    """A prompt of the task about the scene. `rng` draws among phrasings; None gives the plain one.

    Raises:
        ValueError: where the scene cannot satisfy the task.
    """
    if task not in possible_tasks(scene):
        raise ValueError(
            f"a scene of {len(scene.things)} things has no {task} prompt; possible: {possible_tasks(scene)}"
        )
    things, relation = scene.things, scene.relation if task == "position" else None
    match task:
        case "single_object" | "colours":
            wanted = (_want(things[0], task == "colours"),)
        case "counting":
            wanted = (_want(things[0], coloured, len(things)),)
        case "two_objects" | "colour_attribution":
            wanted = (
                _want(things[0], task == "colour_attribution"),
                _want(things[1], task == "colour_attribution"),
            )
        case "position":
            wanted = (_want(things[0], coloured), _want(things[1], coloured))
    if len(wanted) == 2 and rng is not None and rng.random() < 0.5:
        wanted, relation = wanted[::-1], INVERSE[relation] if relation else None
    joint = (
        "and"
        if relation is None
        else (RELATION_PHRASES[relation][rng.integers(3)] if rng is not None else relation)
    )
    prefix = PREFIXES[rng.integers(len(PREFIXES))] if rng is not None else ""
    if prefix == "there is " and wanted[0].number > 1:
        prefix = "there are "
    return Prompt(prefix + f" {joint} ".join(map(_phrase, wanted)), task, wanted, relation)


def caption_scene(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in one of its phrasings; now and then one that leaves the colour out."""
    tasks = possible_tasks(scene)
    weights = np.array([0.4 if task in ("single_object", "two_objects") else 1.0 for task in tasks])
    task = tasks[rng.choice(len(tasks), p=weights / weights.sum())]
    return write_prompt(scene, task, rng, coloured=bool(rng.random() < 0.85)).text


def canonical_caption(scene: Scene) -> str:
    """The one canonical caption: everything the scene shows, things in reading order (columns first within a
    row).
    """
    if scene.is_count:
        return write_prompt(scene, "counting").text
    if len(scene.things) == 1:
        return write_prompt(scene, "colours").text
    if scene.relation is None:
        first, second = sorted(scene.things, key=lambda thing: thing.y)
        return f"{_phrase(_want(first, True))} and {_phrase(_want(second, True))}"
    flip = scene.relation in ("right of", "below")
    ordered = Scene(scene.things[::-1], INVERSE[scene.relation]) if flip else scene
    return write_prompt(ordered, "position").text


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about the scene and its one-phrase answer: colour, shape, number, place, position, or
    whether a caption is true.
    """
    first = scene.things[int(rng.integers(len(scene.things)))]
    number = len(scene.things)
    place = ("top" if first.y < 0.5 else "bottom") + (" left" if first.x < 0.5 else " right")
    look = f"{first.colour} {first.shape}"
    questions = [("how many things are there?", NUMBERS[number])]
    if scene.is_count:
        questions += [(f"how many {_noun(first.shape, 2)} are there?", NUMBERS[number])]
        questions += [(f"what colour are the {_noun(first.shape, 2)}?", first.colour)]
    else:
        questions += [(f"what colour is the {first.shape}?", first.colour), (f"where is the {look}?", place)]
        questions += [(f"what is at the {place}?", f"a {look}")]
    if scene.relation:
        subject, object_ = scene.things
        questions += [
            (f"what is {scene.relation} the {object_.shape}?", f"a {subject.colour} {subject.shape}")
        ]
    return questions[int(rng.integers(len(questions)))]


def claim(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption and whether it is true of the scene; false ones differ in a single fact."""
    task = possible_tasks(scene)[-1] if rng.random() < 0.8 else possible_tasks(scene)[0]
    prompt = write_prompt(scene, task, rng)
    if rng.random() < 0.5:
        return prompt.text, True
    wanted, relation = list(prompt.wanted), prompt.relation
    which = int(rng.integers(len(wanted)))
    want = wanted[which]
    if relation is not None and rng.random() < 0.4:
        relation = INVERSE[relation]
    elif want.number > 1 and rng.random() < 0.5:
        wanted[which] = Wanted(
            want.shape, want.colour, int(rng.choice([n for n in (2, 3, 4) if n != want.number]))
        )
    elif want.colour is not None and rng.random() < 0.6:
        others = [c for c in COLOURS if c != want.colour]
        wanted[which] = Wanted(want.shape, others[rng.integers(len(others))], want.number)
    else:
        others = [s for s in SHAPES if s not in {thing.shape for thing in scene.things}]
        wanted[which] = Wanted(others[rng.integers(len(others))], want.colour, want.number)
    joint = "and" if relation is None else RELATION_PHRASES[relation][rng.integers(3)]
    return f" {joint} ".join(map(_phrase, wanted)), False


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
