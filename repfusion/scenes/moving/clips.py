"""A seed -> a clip of the embedded world -> frames: one thing that moves, changes or appears, with or without
another one that stays.

Things keep to a grid of three cells a side. One that travels crosses a row or a column from end to end; what
stays beside it stands in another one, so that they never touch, or in the middle of the way, where the thing
that moves passes behind it. Some combinations of look and motion are held out, as the combinations of
`repfusion.scenes.world` are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from repfusion.config import Config
from repfusion.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Background,
    Colour,
    Scene,
    Shape,
    Split,
    Thing,
    WorldConfig,
    in_hashed_share,
    is_held_out_pair,
    place,
    render,
    to_uint8,
)

MotionKind = Literal["move", "pass_behind", "recolour", "appear", "stop"]
MOTION_KINDS: tuple[MotionKind, ...] = get_args(MotionKind)
TRAVELS: tuple[MotionKind, ...] = ("move", "pass_behind", "stop")
"""Motions that have a direction."""
Direction = Literal["left", "right", "up", "down"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
STEPS: dict[Direction, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Where each direction leads, as steps of x and y (downwards)."""
REVERSED: dict[Direction, Direction] = {"left": "right", "right": "left", "up": "down", "down": "up"}
CELLS = 3
"""Cells along a side of the frame; a way leads from the first to the last of a row or column."""
WAY = (CELLS - 1) / CELLS
"""Length of a way, as a share of the frame's side."""
MOMENTS = (0.35, 0.65)
"""When in a clip, as a share of its time, something stops, changes or appears."""
BESIDE_SHARE = 0.5
"""Share of clips in which another thing stays beside the one that moves."""
HELD_OUT_SHARE = 0.15
"""Share of the combinations of a look and a motion that no training clip shows."""
CLIP_STREAM = 13
"""Keeps the clips' random numbers apart from those of scenes."""
MAX_TRIES = 10_000

T = TypeVar("T")


class ClipWorldConfig(Config):
    """What a clip of the embedded world looks like."""

    image_size: int = Field(default=64, ge=48)
    """Side of the square frames in pixels; things are a quarter of it, and too small to tell below 48."""
    num_frames: int = Field(default=9, ge=5)
    """Frames of a clip. A causal video VAE that shortens time by 4 takes 4k + 1."""
    rate: float = Field(default=8.0, gt=0, le=120)
    """Frames a second."""
    shapes: tuple[Shape, ...] = SHAPES
    """Shapes that may occur."""
    colours: tuple[Colour, ...] = tuple(COLOURS)
    """Colours that may occur."""
    jitter: float = Field(default=1, ge=0, le=1)
    """How freely things vary in size and place within their cell; 0 is one size, in the middle."""
    background: Background = "black"
    """What is behind the things."""

    @cached_property
    def world(self) -> WorldConfig:
        """The world of its frames."""
        return WorldConfig(
            image_size=self.image_size,
            shapes=self.shapes,
            colours=self.colours,
            cells=CELLS,
            jitter=self.jitter,
            background=self.background,
        )


@dataclass(frozen=True)
class Motion:
    """What a thing does: `direction` of one that travels, `colour` that one of another colour takes on."""

    kind: MotionKind
    direction: Direction | None = None
    colour: Colour | None = None


@dataclass(frozen=True)
class MovingScene:
    """A clip: a thing as it begins, what it does, and a thing that stays, which stands in front where the
    other passes behind it. `moment` is the share of the time at which one stops, changes or appears.
    """

    mover: Thing
    motion: Motion
    beside: Thing | None = None
    moment: float = 0.5

    @property
    def things(self) -> tuple[Thing, ...]:
        """All that it shows, as it begins."""
        return (self.mover,) if self.beside is None else (self.mover, self.beside)

    @property
    def looks(self) -> set[tuple[Colour, Shape]]:
        """Every colour-shape pair that it shows."""
        found: set[tuple[Colour, Shape]] = {(thing.colour, thing.shape) for thing in self.things}
        if self.motion.colour is not None:
            found.add((self.motion.colour, self.mover.shape))
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """The clip as JSON holds it; `moving_scene_of` reads it again."""
        return asdict(self)

    def mover_at(self, time: float) -> Thing | None:
        """The thing that moves, at a share of the clip's time in [0, 1]; None before it appears."""
        motion, mover = self.motion, self.mover
        match motion.kind:
            case "appear":
                return mover if time >= self.moment else None
            case "recolour":
                return mover if time < self.moment else replace(mover, colour=motion.colour)
        assert motion.direction is not None
        gone = min(time, self.moment) if motion.kind == "stop" else time
        x, y = STEPS[motion.direction]
        return replace(mover, x=mover.x + gone * WAY * x, y=mover.y + gone * WAY * y)

    def frame(self, time: float) -> Scene:
        """What the clip shows at a share of its time in [0, 1], the thing in front last."""
        shown = (self.mover_at(time), self.beside)
        return Scene(tuple(thing for thing in shown if thing is not None))


def moving_scene_of(facts: Mapping[str, Any]) -> MovingScene:
    """The clip of its `facts`."""
    beside = None if facts["beside"] is None else Thing(**facts["beside"])
    return MovingScene(Thing(**facts["mover"]), Motion(**facts["motion"]), beside, facts["moment"])


def times(num_frames: int) -> list[float]:
    """The share of a clip's time at which each of its frames is, from 0 to 1."""
    return [frame / (num_frames - 1) for frame in range(num_frames)]


def render_clip(
    clip: MovingScene, config: ClipWorldConfig = ClipWorldConfig()
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a clip."""
    world = config.world
    frames = np.empty((config.num_frames, config.image_size, config.image_size, 3), np.uint8)
    for number, time in enumerate(times(config.num_frames)):
        frames[number] = to_uint8(render(clip.frame(time), world))
    return frames


def is_held_out_motion(mover: Thing, motion: Motion) -> bool:
    """Whether training never shows a thing of that look do that."""
    said = f"motion {mover.colour} {mover.shape} {motion.kind} {motion.direction} {motion.colour}"
    return in_hashed_share(said, HELD_OUT_SHARE)


def has_held_out_look(clip: MovingScene) -> bool:
    """Whether a clip shows a colour-shape pair, or two things together, that training never shows."""
    if clip.looks & HELD_OUT_PAIRS:
        return True
    first, *others = [(thing.colour, thing.shape) for thing in clip.things]
    return any(is_held_out_pair(first, other) for other in others)


def is_held_out_clip(clip: MovingScene) -> bool:
    """Whether training may not show a clip's combination of looks and motion."""
    return has_held_out_look(clip) or is_held_out_motion(clip.mover, clip.motion)


def draw_clip(
    seed: int,
    config: ClipWorldConfig = ClipWorldConfig(),
    split: Split = "train",
    kinds: tuple[MotionKind, ...] = MOTION_KINDS,
) -> MovingScene:
    """The clip of a seed, its motion one of `kinds`, each as often as the others.

    Raises:
        ValueError: where the config allows no clip of the split (too few shapes or colours).
    """
    rng = np.random.default_rng([seed, CLIP_STREAM, 0 if split == "train" else 1])
    if len(set(config.colours)) > 1 and len(set(config.shapes)) > 1 and kinds:
        kind = kinds[rng.integers(len(kinds))]
        for _ in range(MAX_TRIES):
            clip = propose(kind, rng, config)
            if is_held_out_clip(clip) == (split == "held_out"):
                return clip
    raise ValueError(
        f"no {split} clip of the motions {kinds} with shapes {config.shapes} and colours {config.colours}: "
        "allow two shapes and two colours at least"
    )


def propose(kind: MotionKind, rng: np.random.Generator, config: ClipWorldConfig) -> MovingScene:
    """A clip of a motion, held out or not."""
    shape, colour = _other(config.shapes, None, rng), _other(config.colours, None, rng)
    direction = _other(DIRECTIONS, None, rng) if kind in TRAVELS else None
    motion = Motion(kind, direction, _other(config.colours, colour, rng) if kind == "recolour" else None)
    lane = int(rng.integers(CELLS))
    cell = _cell(direction, lane, 0) if direction else (lane, int(rng.integers(CELLS)))
    mover = place(rng, shape, colour, *cell, config.world)
    beside = draw_beside(mover, motion, rng, config)
    if kind != "pass_behind" and rng.random() >= BESIDE_SHARE:
        beside = None
    return MovingScene(mover, motion, beside, float(rng.uniform(*MOMENTS)))


def draw_beside(mover: Thing, motion: Motion, rng: np.random.Generator, config: ClipWorldConfig) -> Thing:
    """A thing of another shape, in a colour that the moving one never has: in the middle of its way, where
    that passes behind it, else in another row or column.
    """
    shape = _other(config.shapes, mover.shape, rng)
    colour = _other(config.colours, mover.colour, rng)
    while colour == motion.colour and len(set(config.colours)) > 2:
        colour = _other(config.colours, mover.colour, rng)
    lanes = [lane for lane in range(CELLS) if lane != _lane(mover, motion.direction)]
    lane, step = int(rng.choice(lanes)), int(rng.integers(CELLS))
    if motion.kind == "pass_behind":
        lane, step = _lane(mover, motion.direction), CELLS // 2
    return place(rng, shape, colour, *_cell(motion.direction, lane, step), config.world)


def _lane(mover: Thing, direction: Direction | None) -> int:
    """The row that a thing keeps to, or the column where it moves up or down."""
    return int((mover.x if direction in ("up", "down") else mover.y) * CELLS)


def _cell(direction: Direction | None, lane: int, step: int) -> tuple[int, int]:
    """Row and column of the cell that a way in a lane reaches after so many cells."""
    along = CELLS - 1 - step if direction in ("left", "up") else step
    return (along, lane) if direction in ("up", "down") else (lane, along)


def _other(options: tuple[T, ...], own: T | None, rng: np.random.Generator) -> T:
    others = [option for option in options if option != own]
    return others[rng.integers(len(others))]
