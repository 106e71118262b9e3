"""A clip -> an instruction that changes it, and the clip that it asks for; whether frames show that done.

One thing is said to change and nothing else does: what is kept is where it was in every frame, to the pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from repfusion.scenes.captions import Wanted, Wording, choose
from repfusion.scenes.edit_rules import EditFinding
from repfusion.scenes.moving.captions import ClipPrompt, write_clip_prompt
from repfusion.scenes.moving.clips import (
    MAX_TRIES,
    MOTION_KINDS,
    REVERSED,
    STEPS,
    TRAVELS,
    WAY,
    ClipWorldConfig,
    MotionKind,
    MovingScene,
    draw_beside,
    draw_clip,
    is_held_out_clip,
    times,
)
from repfusion.scenes.moving.tracking import MIN_SEEN, STILL, Frames, check_clip, distance, follow
from repfusion.scenes.world import Split, Thing

ClipEditKind = Literal["recolour", "replace", "remove", "add", "redirect", "halt"]
CLIP_EDIT_KINDS: tuple[ClipEditKind, ...] = get_args(ClipEditKind)
CLIP_EDIT_STREAM = 17
"""Keeps the edits' random numbers apart from the clips'."""
WORDS: dict[ClipEditKind, tuple[str, ...]] = {
    "recolour": ("make the {mover} {new}", "paint the {mover} {new}", "let the {mover} be {new}"),
    "replace": (
        "replace the {mover} with a {new}",
        "swap the {mover} for a {new}",
        "make the {mover} a {new}",
    ),
    "remove": ("remove the {beside}", "take the {beside} away", "erase the {beside}"),
    "add": ("add a {new} that stays", "put a {new} beside it that does not move"),
    "redirect": ("let the {mover} move {new} instead", "make the {mover} go {new}"),
    "halt": ("let the {mover} stop on its way", "make the {mover} halt halfway"),
}
"""How each kind of edit is asked for; the first is the plain one."""
_NOT_PASSING: tuple[MotionKind, ...] = ("move", "recolour", "appear", "stop")
ADMITTED: dict[ClipEditKind, tuple[MotionKind, ...]] = {
    "recolour": ("move", "pass_behind", "appear", "stop"),
    "replace": MOTION_KINDS,
    "remove": _NOT_PASSING,
    "add": _NOT_PASSING,
    "redirect": TRAVELS,
    "halt": ("move",),
}
"""Motions that each kind of edit is of: what is passed behind stays, and what changes its colour anyway has
none to change.
"""


@dataclass(frozen=True)
class ClipEdit:
    """A clip, what is to be done to it, and a clip that shows it done."""

    kind: ClipEditKind
    source: MovingScene
    instruction: str
    target: MovingScene

    @property
    def keeps_path(self) -> bool:
        """Whether the thing that moves is to be where it was in every frame."""
        return self.kind not in ("redirect", "halt")


def possible_clip_edits(clip: MovingScene) -> tuple[ClipEditKind, ...]:
    """Kinds of edits that a clip admits."""
    needs = {"remove": clip.beside is not None, "add": clip.beside is None}
    return tuple(
        kind for kind in CLIP_EDIT_KINDS if clip.motion.kind in ADMITTED[kind] and needs.get(kind, True)
    )


def draw_clip_edit(
    seed: int,
    config: ClipWorldConfig = ClipWorldConfig(),
    split: Split = "train",
    wording: Wording = "varied",
    kinds: Sequence[ClipEditKind] = CLIP_EDIT_KINDS,
) -> ClipEdit:
    """The edit of a seed, its kind one of `kinds`, each as often as the others. In training neither source
    nor target shows what is held out; a held-out target comes from either.

    Raises:
        ValueError: where the config allows no such edit.
    """
    rng = np.random.default_rng([seed, CLIP_EDIT_STREAM, 0 if split == "train" else 1])
    kind = kinds[rng.integers(len(kinds))]
    for attempt in range(MAX_TRIES):
        of = split if split == "train" or attempt % 2 else "train"
        clip = draw_clip(seed + (attempt << 64), config, of, ADMITTED[kind])
        if kind not in possible_clip_edits(clip):
            continue
        target, new = _change(kind, clip, rng, config)
        if target != clip and is_held_out_clip(target) == (split == "held_out"):
            words = WORDS[kind][0] if wording == "plain" else choose(WORDS[kind], rng)
            said = {"mover": _look(clip.mover), "beside": clip.beside and _look(clip.beside), "new": new}
            return ClipEdit(kind, clip, words.format(**said), target)
    raise ValueError(f"no {split} edit of the kind {kind!r} with {config.shapes} and {config.colours}")


def _change(
    kind: ClipEditKind, clip: MovingScene, rng: np.random.Generator, config: ClipWorldConfig
) -> tuple[MovingScene, str]:
    """The clip after it, and the words for what is new; the clip itself where what was drawn does not fit."""
    mover, motion = clip.mover, clip.motion
    match kind:
        case "recolour":
            colour = config.colours[rng.integers(len(config.colours))]
            taken = clip.beside is not None and clip.beside.colour == colour
            return (clip if taken else replace(clip, mover=replace(mover, colour=colour))), colour
        case "replace":
            shape = config.shapes[rng.integers(len(config.shapes))]
            taken = clip.beside is not None and clip.beside.shape == shape
            changed = replace(mover, shape=shape)
            return (clip if taken else replace(clip, mover=changed)), _look(changed)
        case "remove":
            return replace(clip, beside=None), ""
        case "add":
            added = draw_beside(mover, motion, rng, config)
            return replace(clip, beside=added), _look(added)
        case "redirect":
            assert motion.direction is not None
            (x, y), back = STEPS[motion.direction], REVERSED[motion.direction]
            start = replace(mover, x=mover.x + WAY * x, y=mover.y + WAY * y)
            return replace(clip, mover=start, motion=replace(motion, direction=back)), back
        case "halt":
            return replace(clip, motion=replace(motion, kind="stop")), ""


def check_clip_edit(edit: ClipEdit, found: Frames) -> EditFinding:
    """What the things of a clip's frames say of an edit: whether what was asked for is done, and whether the
    rest was kept.
    """
    missing, lost = _not_changed(edit, found), _not_kept(edit, found)
    return EditFinding(not missing, not lost, missing or lost)


def _not_changed(edit: ClipEdit, found: Frames) -> str:
    """What of the instruction is not done; empty where all is."""
    beside = edit.source.beside
    if edit.kind == "remove":
        assert beside is not None
        seen = sum(thing is not None for thing in follow(found, _wanted(beside)))
        return f"the {_look(beside)} is still there" if seen > (1 - MIN_SEEN) * len(found) else ""
    return check_clip(found, _asked(edit)).reason


def _asked(edit: ClipEdit) -> ClipPrompt:
    """What an instruction states about the target: a thing that stays only where it was added."""
    return write_clip_prompt(edit.target, says_beside=edit.kind == "add")


def _not_kept(edit: ClipEdit, found: Frames) -> str:
    """What was to stay as it was and has not; empty where all has."""
    target = edit.target
    frames = [target.frame(time).things for time in times(len(found))]
    kept = [] if target.beside is None or target.beside != edit.source.beside else [target.beside]
    wanted = [[thing for thing in things if thing in kept] for things in frames]
    if edit.keeps_path:
        for time, things in zip(times(len(found)), wanted, strict=True):
            mover = target.mover_at(time)
            if mover is not None and not _is_covered(mover, target.beside):
                things.append(mover)
    right = [all(_is_at(one, shown) for one in things) for things, shown in zip(wanted, found, strict=True)]
    if sum(right) < MIN_SEEN * len(found):
        return f"what was to stay is where it was in {sum(right)} of {len(found)} frames"
    more = [len(shown) > len(things) for shown, things in zip(found, frames, strict=True)]
    return "something else has come" if sum(more) > (1 - MIN_SEEN) * len(found) else ""


def _is_covered(thing: Thing, front: Thing | None) -> bool:
    """Whether a thing's box reaches into that of the thing in front."""
    if front is None:
        return False
    room = (thing.size + front.size) / 2 + STILL / 2
    return abs(thing.x - front.x) < room and abs(thing.y - front.y) < room


def _is_at(thing: Thing, shown: Sequence[Thing]) -> bool:
    """Whether a frame shows a thing's look at its place."""
    return any(_look(one) == _look(thing) and distance(one, thing) <= STILL for one in shown)


def _wanted(thing: Thing) -> Wanted:
    return Wanted(thing.shape, thing.colour)


def _look(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"
