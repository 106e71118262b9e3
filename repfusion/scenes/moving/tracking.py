"""Frames -> the things that each shows -> whether they do what a prompt says. Exact: no learned part.

Each frame goes through the detector of images. A thing is followed by its look, from frame to frame to the
nearest one; a thing that is partly covered shows no shape, so it is not found while it passes behind another.
Rules forgive a quarter of the frames and things that nobody asked for; what they demand of distances is far
from what any right clip of this world has.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import UInt8

from repfusion.scenes.captions import Wanted
from repfusion.scenes.detector import Finding, detect
from repfusion.scenes.moving.captions import ClipPrompt
from repfusion.scenes.moving.clips import MOTION_KINDS, STEPS, Direction, MotionKind
from repfusion.scenes.world import Thing

Frames = Sequence[Sequence[Thing]]
"""What each frame shows."""
Track = list[Thing | None]
"""A thing in each frame; None where it is not found."""
MIN_SEEN = 0.75
"""Share of the frames in which a thing has to be found where it is to be seen."""
MIN_TRAVEL = 0.2
"""Shortest way, as a share of the frame's side, that counts as moving."""
STILL = 0.06
"""Longest way, as a share of the frame's side, that counts as staying."""
MAX_DRIFT = 0.5
"""Longest way across a direction, as a share of that along it."""
BACK = 0.02
"""Longest way back between two frames, as a share of the side."""
END = 0.3
"""Share of the time, at its end, by which going on is told from having stopped."""
GOING_ON = 0.5
"""Least speed over the end, as a share of the mean one, that is going on."""


def track(frames: UInt8[np.ndarray, "f h w 3"]) -> list[list[Thing]]:
    """The things in each square frame.

    Raises:
        ValueError: where frames are not square.
    """
    return [detect(np.moveaxis(frame, -1, 0).astype(np.float32) / 255) for frame in frames]


def score_clip(frames: UInt8[np.ndarray, "f h w 3"], prompt: ClipPrompt) -> bool:
    """Whether a clip shows what the prompt states."""
    return check_clip(track(frames), prompt).correct


def scores_by_task(prompts: Sequence[ClipPrompt], found: Sequence[Finding]) -> dict[MotionKind, float]:
    """The share of right clips of each task that occurs."""
    pairs = list(zip(prompts, found, strict=True))
    right: dict[MotionKind, list[bool]] = {
        task: [one.correct for prompt, one in pairs if prompt.task == task] for task in MOTION_KINDS
    }
    return {task: sum(ones) / len(ones) for task, ones in right.items() if ones}


def check_clip(found: Frames, prompt: ClipPrompt) -> Finding:
    """Whether the things of a clip's frames satisfy a prompt's facts, and the first that fails."""
    reason = _not_done(found, prompt)
    if not reason and prompt.beside is not None:
        reason = _not_still(follow(found, prompt.beside), _look(prompt.beside))
    return Finding(not reason, reason)


def follow(found: Frames, want: Wanted) -> Track:
    """The track of a look: in each frame the thing that has it, of several the nearest to the last seen."""
    tracked: Track = []
    last: Thing | None = None
    for things in found:
        fitting = [thing for thing in things if (thing.shape, thing.colour) == (want.shape, want.colour)]
        if last is not None:
            fitting.sort(key=lambda thing, last=last: distance(thing, last))
        tracked.append(fitting[0] if fitting else None)
        last = tracked[-1] or last
    return tracked


def distance(one: Thing, other: Thing) -> float:
    """How far two things' centres lie from each other, as a share of the frame's side."""
    return float(np.hypot(one.x - other.x, one.y - other.y))


def _not_done(found: Frames, prompt: ClipPrompt) -> str:
    """What of the motion is not to be seen; empty where all is."""
    motion, seen, look = prompt.motion, follow(found, prompt.mover), _look(prompt.mover)
    match motion.kind:
        case "recolour":
            return _not_recoloured(seen, follow(found, Wanted(prompt.mover.shape, motion.colour)), look)
        case "appear":
            return _not_appeared(seen, look)
        case "pass_behind":
            assert prompt.beside is not None and motion.direction is not None
            return _not_behind(seen, follow(found, prompt.beside), motion.direction, look)
    assert motion.direction is not None
    fault = _seldom(seen, look) or _not_going(seen, motion.direction, look)
    if fault:
        return fault
    goes_on = _speed_at_end(seen, motion.direction) >= GOING_ON
    if motion.kind == "stop":
        return f"the {look} does not stop" if _way_at_end(seen) > STILL else ""
    return "" if goes_on else f"the {look} stops"


def _not_going(seen: Track, direction: Direction, look: str) -> str:
    """What says that a thing does not move in a direction: too short a way, one across, or a way back."""
    ways = [_along(thing, direction) for thing in seen if thing is not None]
    along, across = ways[-1][0] - ways[0][0], max(abs(way[1] - ways[0][1]) for way in ways)
    if along < MIN_TRAVEL:
        return f"the {look} does not move {direction}"
    if across > MAX_DRIFT * along:
        return f"the {look} moves across"
    is_back = any(after[0] < before[0] - BACK for before, after in pairwise(ways))
    return f"the {look} moves back" if is_back else ""


def _not_behind(seen: Track, front: Track, direction: Direction, look: str) -> str:
    """What says that a thing does not pass behind another: in front, the other one would be covered."""
    places = [number for number, thing in enumerate(seen) if thing is not None]
    if not places:
        return f"no {look}"
    if fault := _not_going(seen, direction, look):
        return fault
    middle = next((thing for thing in front if thing is not None), None)
    if middle is None:
        return f"nothing that the {look} passes behind"
    first, last = seen[places[0]], seen[places[-1]]
    assert first is not None and last is not None
    sides = [_along(thing, direction)[0] - _along(middle, direction)[0] for thing in (first, last)]
    if not sides[0] < 0 < sides[1]:
        return f"the {look} does not pass it"
    hidden = [number for number in range(places[0], places[-1]) if seen[number] is None]
    if not hidden:
        return f"the {look} is seen all the way"
    return "" if all(front[number] is not None for number in hidden) else f"the {look} covers the other"


def _not_recoloured(before: Track, after: Track, look: str) -> str:
    """What says that a thing does not change from one look to another where it stands."""
    old = [number for number, thing in enumerate(before) if thing is not None]
    new = [number for number, thing in enumerate(after) if thing is not None]
    if not old or not new:
        return f"no {look}" if not old else f"the {look} keeps its colour"
    if len(old) + len(new) < MIN_SEEN * len(before):
        return f"the {look} is seen too seldom"
    if old[-1] >= new[0]:
        return f"the {look} and its other colour are seen at a time, or the wrong way round"
    one, other = before[old[-1]], after[new[0]]
    assert one is not None and other is not None
    return "" if distance(one, other) <= STILL else f"the {look} does not stay where it is"


def _not_appeared(seen: Track, look: str) -> str:
    """What says that a thing is not first absent and then there, where it stays."""
    places = [number for number, thing in enumerate(seen) if thing is not None]
    if not places:
        return f"no {look}"
    if places[0] == 0:
        return f"the {look} is there from the beginning"
    if seen[-1] is None or len(places) < MIN_SEEN * (len(seen) - places[0]):
        return f"the {look} does not stay"
    return _moved(seen, look)


def _not_still(seen: Track, look: str) -> str:
    """What says that a thing is not there all the time in one place."""
    return _seldom(seen, look) or _moved(seen, look)


def _seldom(seen: Track, look: str) -> str:
    number = sum(thing is not None for thing in seen)
    if number == 0:
        return f"no {look}"
    return "" if number >= MIN_SEEN * len(seen) else f"the {look} is in {number} of {len(seen)} frames"


def _moved(seen: Track, look: str) -> str:
    there = [thing for thing in seen if thing is not None]
    return f"the {look} moves" if any(distance(there[0], one) > STILL for one in there) else ""


def _at_end(seen: Track) -> tuple[Thing, Thing, float]:
    """Where a thing is at the last frame that shows it, where it was before the end of the clip began, and
    the share of the clip's time between.
    """
    places = [number for number, thing in enumerate(seen) if thing is not None]
    begin = max((number for number in places if number <= (1 - END) * (len(seen) - 1)), default=places[0])
    one, other = seen[begin], seen[places[-1]]
    assert one is not None and other is not None
    return one, other, (places[-1] - begin) / (len(seen) - 1)


def _way_at_end(seen: Track) -> float:
    one, other, _ = _at_end(seen)
    return distance(one, other)


def _speed_at_end(seen: Track, direction: Direction) -> float:
    """How fast a thing moves at the end, as a share of its mean speed."""
    one, other, share = _at_end(seen)
    places = [number for number, thing in enumerate(seen) if thing is not None]
    first = seen[places[0]]
    assert first is not None
    whole = _along(other, direction)[0] - _along(first, direction)[0]
    time = (places[-1] - places[0]) / (len(seen) - 1)
    way = _along(other, direction)[0] - _along(one, direction)[0]
    return 0.0 if share == 0 else (way / share) / (whole / time)


def _along(thing: Thing, direction: Direction) -> tuple[float, float]:
    """Where a thing's centre is along a direction and across it, as shares of the frame's side."""
    x, y = STEPS[direction]
    return thing.x * x + thing.y * y, thing.x * abs(y) + thing.y * abs(x)


def _look(want: Wanted) -> str:
    return f"{want.colour} {want.shape}"
