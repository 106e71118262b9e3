"""Facts -> a terse prompt, as people in a hurry write it, and its rewriting in the plain words of captions.

Terse prompts drop articles, put nouns before their adjectives, list things, and use words that no caption
has ("crimson wedge"): a generator that was trained on captions needs the rewriting. Now and
then a prompt of one thing asks for a word in quotes, which a rewriting keeps to the letter.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from repfusion.scenes.captions import (
    ADJECTIVES,
    NOUNS,
    NUMBERS,
    RELATION_ENDINGS,
    Prompt,
    Wanted,
    Wording,
    caption_scene,
    facts_of,
    plural,
    possible_tasks,
    say,
    turned,
)
from repfusion.scenes.world import Colour, Relation, Scene, Shape

TERSE_NOUNS: dict[Shape, tuple[str, ...]] = {
    "circle": ("dot", "orb"),
    "square": ("block", "tile"),
    "triangle": ("wedge", "pyramid"),
    "cross": ("plus sign", "mark"),
    "diamond": ("lozenge", "kite"),
}
TERSE_ADJECTIVES: dict[Colour, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("azure", "sapphire"),
    "yellow": ("golden", "lemon"),
    "purple": ("lilac", "mauve"),
    "cyan": ("aqua", "teal"),
}
TERSE_RELATIONS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "left", "<"),
    "right of": ("right of", "right", ">"),
    "above": ("above", "over", "^"),
    "below": ("below", "under", "v"),
}
CaptionWording = Wording | Literal["terse"]
"""How captions put what they state: in a wording of captions, or as terse prompts do, none with quotes."""
LISTINGS = (" ", ", ", " + ", " & ")
QUOTED_SHARE = 0.2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Rewriting:
    """A terse prompt, its rewriting, and the word in quotes that both hold, or none."""

    terse: str
    plain: str
    quoted: str | None = None


def caption_in(scene: Scene, rng: np.random.Generator, wording: CaptionWording) -> str:
    """A caption of the scene in a wording."""
    if wording == "terse":
        return draw_rewriting(scene, rng, quoted_share=0.0).terse
    return caption_scene(scene, rng, wording)


def put_tersely(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """A prompt that states the same in few words."""
    return replace(prompt, text=say_tersely(prompt.wanted, prompt.relation, rng))


def draw_rewriting(scene: Scene, rng: np.random.Generator, quoted_share: float = QUOTED_SHARE) -> Rewriting:
    """A terse prompt about the scene with its rewriting, things in the same order; of prompts of one thing
    `quoted_share` ask for a word in quotes.
    """
    tasks = possible_tasks(scene)
    task = tasks[rng.integers(len(tasks))]
    wanted, relation = facts_of(scene, task, bool(rng.random() < 0.85))
    if len(wanted) == 2 and rng.random() < 0.5:
        wanted, relation = turned(wanted, relation)
    terse, plain = say_tersely(wanted, relation, rng), say(wanted, relation)
    if len(wanted) > 1 or rng.random() >= quoted_share:
        return Rewriting(terse, plain)
    quoted = "".join(rng.choice(list(LETTERS), int(rng.integers(3, 7))))
    return Rewriting(f'{terse}, "{quoted}"', f'{plain} with the word "{quoted}"', quoted)


def say_tersely(wanted: tuple[Wanted, ...], relation: Relation | None, rng: np.random.Generator) -> str:
    """Facts in few words, one of many ways of each."""
    things = [say_thing_tersely(want, rng) for want in wanted]
    if relation is None:
        return _one(LISTINGS, rng).join(things)
    if rng.random() < 0.25:
        return f"{things[1]}, {things[0]} {_one(RELATION_ENDINGS[relation], rng)}"
    return f"{things[0]} {_one(TERSE_RELATIONS[relation], rng)} {things[1]}"


def say_thing_tersely(want: Wanted, rng: np.random.Generator) -> str:
    """A wanted thing: "crimson dot", "circle: red", "3x green triangle"."""
    noun = _one((*NOUNS[want.shape], *TERSE_NOUNS[want.shape]), rng)
    if want.colour is None:
        look = noun
    else:
        adjective = _one((*ADJECTIVES[want.colour], *TERSE_ADJECTIVES[want.colour]), rng)
        look = _one((f"{adjective} {noun}", f"{noun} {adjective}", f"{noun}: {adjective}"), rng)
    if want.number == 1:
        return look
    digit, word = want.number, NUMBERS[want.number]
    several = f"{word} {plural(noun)}" + (f" {look.replace(noun, '').strip(' :')}" if want.colour else "")
    return _one((f"{digit}x {look}", f"{look} x{digit}", several), rng)


def _one(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[rng.integers(len(words))]
