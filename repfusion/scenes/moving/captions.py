"""A clip -> captions of its motion, and prompts that carry the facts a detector can check over frames.

Tasks are the motions. A held-out prompt asks for a combination of look and motion that training never shows,
of looks and motions that it does show.
"""

from dataclasses import dataclass

import numpy as np

from repfusion.scenes.captions import Wanted, Wording, choose, say_thing
from repfusion.scenes.moving.clips import (
    MOTION_KINDS,
    ClipWorldConfig,
    Direction,
    Motion,
    MotionKind,
    MovingScene,
    draw_clip,
    has_held_out_look,
)
from repfusion.scenes.world import Split, Thing

OPENINGS = ("", "in this clip, ", "a clip in which ", "a video where ", "show me how ")
"""Before a sentence; the first is the plain one."""
WAYS: dict[Direction, tuple[str, ...]] = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "towards the top"),
    "down": ("down", "downwards", "towards the bottom"),
}
VERBS: dict[MotionKind, tuple[str, ...]] = {
    "move": ("moves {way}", "is moving {way}", "goes {way}", "travels {way}"),
    "pass_behind": ("moves {way} behind {other}", "goes {way} behind {other}", "passes behind {other} {way}"),
    "recolour": ("turns {colour}", "becomes {colour}", "changes its colour to {colour}"),
    "appear": ("appears", "comes into view", "shows up"),
    "stop": ("moves {way} and stops", "goes {way} and halts", "moves {way}, then stands still"),
}
"""What is said of each motion, after the thing that does it; the first is the plain one."""
STAYS = ("while {} stays", "while {} stands still", "and {} does not move")
SAID_BESIDE = 0.7
"""Share of captions that name a thing which stays, where there is one."""


@dataclass(frozen=True)
class ClipPrompt:
    """A text and the facts it states: what moves, how, and what stays or is passed behind."""

    text: str
    task: MotionKind
    mover: Wanted
    motion: Motion
    beside: Wanted | None = None


def caption_clip(clip: MovingScene, rng: np.random.Generator, wording: Wording = "varied") -> str:
    """A caption of a clip in one of its phrasings; now and then one that leaves out what stays."""
    says_beside = bool(rng.random() < SAID_BESIDE)
    return write_clip_prompt(clip, rng if wording == "varied" else None, says_beside).text


def write_clip_prompt(
    clip: MovingScene, rng: np.random.Generator | None = None, says_beside: bool = True
) -> ClipPrompt:
    """The prompt of a clip. `rng` draws among the phrasings; None gives the plain one. What is passed behind
    is named in any case.
    """
    mover, motion = _want(clip.mover), clip.motion
    named = clip.beside if says_beside or motion.kind == "pass_behind" else None
    beside = None if named is None else _want(named)
    return ClipPrompt(say_motion(mover, motion, beside, rng), motion.kind, mover, motion, beside)


def say_motion(
    mover: Wanted, motion: Motion, beside: Wanted | None = None, rng: np.random.Generator | None = None
) -> str:
    """Facts of a clip in words; `rng` as of `write_clip_prompt`."""

    def one(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else choose(options, rng)

    other = "" if beside is None else say_thing(beside, rng)
    way = "" if motion.direction is None else one(WAYS[motion.direction])
    verb = one(VERBS[motion.kind]).format(way=way, other=other, colour=motion.colour)
    said = f"{one(OPENINGS)}{say_thing(mover, rng)} {verb}"
    return said if not other or motion.kind == "pass_behind" else f"{said} {one(STAYS).format(other)}"


def draw_clip_prompts(
    num: int, seed: int = 0, config: ClipWorldConfig = ClipWorldConfig(), split: Split = "held_out"
) -> list[ClipPrompt]:
    """`num` prompts in plain wording, the motions in turn: about held-out clips that are new in the
    combination of look and motion alone, or about such as training shows.
    """
    prompts: list[ClipPrompt] = []
    clip_seed = seed * 1_000_003
    while len(prompts) < num:
        task = MOTION_KINDS[len(prompts) % len(MOTION_KINDS)]
        clip = draw_clip(clip_seed, config, split, (task,))
        clip_seed += 1
        if not has_held_out_look(clip):
            prompts.append(write_clip_prompt(clip))
    return prompts


def _want(thing: Thing) -> Wanted:
    return Wanted(thing.shape, thing.colour)
