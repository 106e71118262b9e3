"""A seed -> a scene of coloured shapes -> pixels.

Things stand in distinct cells of a square grid, jittered, so that they never touch. Some combinations of
shape, colour, number and relation are held out: `draw_scene` gives them only for `split="held_out"`, so no
training image ever shows them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, field_validator

from repfusion.config import Config

Shape = Literal["circle", "square", "triangle", "cross", "diamond"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Relation = Literal["left of", "right of", "above", "below"]
Split = Literal["train", "held_out"]
Background = Literal["black", "grey", "white", "navy"]
Texture = Literal["stripes", "grain"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: dict[Colour, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.70, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.20, 0.80),
    "cyan": (0.10, 0.80, 0.90),
}
NEW_SHAPE: Shape = "diamond"
NEW_COLOUR: Colour = "cyan"
BASE_SHAPES: tuple[Shape, ...] = tuple(shape for shape in SHAPES if shape != NEW_SHAPE)
BASE_COLOURS: tuple[Colour, ...] = tuple(colour for colour in COLOURS if colour != NEW_COLOUR)
BACKGROUNDS: dict[Background, tuple[float, float, float]] = {
    "black": (0.10, 0.10, 0.10),
    "grey": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "navy": (0.05, 0.08, 0.30),
}
"""Colours half mixed with any of these stay at least 0.18 from the mixing line of every other colour (RGB
distance), as on black; olive, teal and pink do not.
"""
GAP = 0.08
"""Least distance between neighbours, as a share of a cell."""
TEXTURE_DEPTH = 0.12
"""Share by which a texture lightens or darkens a thing's colour."""
TEXTURE_PERIODS = 4
"""Stripes across a thing's box."""
GRAINS = 8
"""Grains along a side of a thing's box."""

HELD_OUT_PAIRS: frozenset[tuple[Colour, Shape]] = frozenset(
    {("red", "triangle"), ("blue", "cross"), ("purple", "square"), ("cyan", "circle"), ("yellow", "diamond")}
)
"""Colour-shape pairs that no training image shows, alone or beside others."""

INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


class WorldConfig(Config):
    image_size: int = Field(default=64, ge=16)
    """Side of the square image in pixels."""
    shapes: tuple[Shape, ...] = SHAPES
    """Shapes that may occur."""
    colours: tuple[Colour, ...] = tuple(COLOURS)
    """Colours that may occur."""
    new_share: float | None = Field(default=None, ge=0, le=1)
    """Share of scenes that show the new shape or colour; None leaves it to chance."""
    relation_share: float | None = Field(default=None, ge=0, le=1)
    """Share of scenes whose two things stand in a relation; None leaves it to chance."""
    cells: int = Field(default=2, ge=2)
    """Cells along a side of the placement grid."""
    sizes: tuple[float, float] = (0.62, 0.78)
    """Smallest and largest side of a thing, as fractions of its cell."""
    jitter: float = Field(default=1, ge=0, le=1)
    """How freely things vary in size and place within their cell; 0 is one size, in the middle."""
    background: Background = "black"
    """What is behind the things."""
    texture: Texture | None = None
    """What varies the brightness of things; None is one flat colour."""

    @field_validator("sizes")
    @classmethod
    def _sizes_leave_a_gap(cls, sizes: tuple[float, float]) -> tuple[float, float]:
        low, high = sizes
        if not 0 < low <= high <= 1 - GAP:
            raise ValueError(
                f"smallest {low} and largest {high}; expected 0 < smallest <= largest <= {1 - GAP:g}, which "
                "keeps neighbours apart"
            )
        return sizes


@dataclass(frozen=True)
class Thing:
    """A shape of one colour; centre and size are fractions of the image's side."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    size: float

    @property
    def is_new(self) -> bool:
        return self.shape == NEW_SHAPE or self.colour == NEW_COLOUR


@dataclass(frozen=True)
class Scene:
    """One thing, two different things, or two to four alike; `relation` tells how the first of two stands to
    the second.
    """

    things: tuple[Thing, ...]
    relation: Relation | None = None

    @property
    def is_count(self) -> bool:
        return len(self.things) > 1 and len({(thing.shape, thing.colour) for thing in self.things}) == 1

    @property
    def has_new(self) -> bool:
        return any(thing.is_new for thing in self.things)

    @property
    def facts(self) -> dict[str, Any]:
        """The scene as JSON holds it; `scene_of` reads it again."""
        return {"things": [asdict(thing) for thing in self.things], "relation": self.relation}


def scene_of(facts: Mapping[str, Any]) -> Scene:
    """The scene of its `facts`."""
    return Scene(tuple(Thing(**thing) for thing in facts["things"]), facts["relation"])


def in_hashed_share(text: str, share: float) -> bool:
    """Whether a text is in a share in [0, 1] of all texts, by its hash: the same on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def is_held_out_pair(first: tuple[Colour, Shape], second: tuple[Colour, Shape]) -> bool:
    """Whether two differing things are never shown together in training, however they stand."""
    names = sorted([" ".join(first), " ".join(second)])
    return in_hashed_share("pair " + " & ".join(names), 0.12)


def is_held_out(scene: Scene) -> bool:
    """Whether training may not show this scene's combination of shape, colour, number and relation."""
    looks = [(thing.colour, thing.shape) for thing in scene.things]
    if any(look in HELD_OUT_PAIRS for look in looks):
        return True
    if scene.is_count:
        return in_hashed_share(f"count {len(looks)} {looks[0]}", 0.2)
    if len(looks) == 2:
        if is_held_out_pair(looks[0], looks[1]):
            return True
        if scene.relation is not None:
            first, relation, second = looks[0], scene.relation, looks[1]
            if relation in ("right of", "below"):
                first, relation, second = second, INVERSE[relation], first
            return in_hashed_share(f"relation {first} {relation} {second}", 0.12)
    return False


def draw_scene(seed: int, config: WorldConfig = WorldConfig(), split: Split = "train") -> Scene:
    """The scene of a seed: a third each of one thing, two different things, two to four alike.

    Raises:
        ValueError: where the config allows no scene of the split (too few shapes or colours).
    """
    if len(set(config.shapes)) < 2:
        raise ValueError(f"shapes {config.shapes}: a scene of two different things needs at least two shapes")
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    wants_new, wants_relation = (
        None if share is None else bool(rng.random() < share)
        for share in (config.new_share, config.relation_share)
    )
    for _ in range(10_000):
        scene = _propose(rng, config)
        if (
            is_held_out(scene) == (split == "held_out")
            and wants_new in (None, scene.has_new)
            and wants_relation in (None, scene.relation is not None)
        ):
            return scene
    raise ValueError(
        f"no {split} scene with shapes {config.shapes} and colours {config.colours}: allow more of them"
    )


def _propose(rng: np.random.Generator, config: WorldConfig) -> Scene:
    kind = rng.choice(["single", "pair", "count"], p=[0.3, 0.4, 0.3])
    number = {"single": 1, "pair": 2}.get(kind) or int(rng.integers(2, 5))
    look = _draw_look(rng, config)
    looks = [look] * number
    if kind == "pair":
        while looks[1][0] == look[0]:
            looks[1] = _draw_look(rng, config)
    cells = rng.choice(config.cells**2, size=number, replace=False)
    rows, cols = (cells // config.cells).tolist(), (cells % config.cells).tolist()
    things = tuple(
        place(rng, *look, row, col, config) for look, row, col in zip(looks, rows, cols, strict=True)
    )
    relation = relation_between(*zip(rows, cols, strict=True)) if kind == "pair" else None
    return Scene(things, relation)


def relation_between(first: tuple[int, int], second: tuple[int, int]) -> Relation | None:
    """How a cell (row, column) stands to another; None where they share neither row nor column."""
    if first[0] == second[0]:
        return "left of" if first[1] < second[1] else "right of"
    if first[1] == second[1]:
        return "above" if first[0] < second[0] else "below"
    return None


def corner_of(thing: Thing) -> str:
    """The quarter of the image that a thing's centre is in: "top left"."""
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def _draw_look(rng: np.random.Generator, config: WorldConfig) -> tuple[Shape, Colour]:
    return config.shapes[rng.integers(len(config.shapes))], config.colours[rng.integers(len(config.colours))]


def place(
    rng: np.random.Generator, shape: Shape, colour: Colour, row: int, col: int, config: WorldConfig
) -> Thing:
    """A thing somewhere in its cell."""
    cells, (low, high) = config.cells, config.sizes
    narrowed = (1 - config.jitter) * (high - low) / 2
    size = rng.uniform(low + narrowed, high - narrowed) / cells
    # rounding may leave the largest thing less than nothing
    slack = config.jitter * max(0.0, (1 / cells - size) / 2 - GAP / 2 / cells)
    x = (col + 0.5) / cells + rng.uniform(-slack, slack)
    y = (row + 0.5) / cells + rng.uniform(-slack, slack)
    return Thing(shape, colour, float(x), float(y), float(size))


def inside(shape: Shape, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """Which points of the box [-1, 1]^2 (y downwards) belong to the shape."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return (abs(x) <= 0.9) & (abs(y) <= 0.9)
        case "triangle":
            return (y <= 0.9) & (abs(x) <= (y + 1) / 1.9)
        case "cross":
            return ((abs(x) <= 0.34) & (abs(y) <= 1)) | ((abs(y) <= 0.34) & (abs(x) <= 1))
        case "diamond":
            return abs(x) + abs(y) <= 1


def shade(
    texture: Texture, thing: Thing, x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Brightness in [-1, 1] at points of the thing's box [-1, 1]^2. The thing alone decides the pattern, so
    that a scene has the same pixels every time and the same look at every size.
    """
    digest = hashlib.sha256(repr(thing).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    match texture:
        case "stripes":
            angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 1)
            across = (np.cos(angle) * x + np.sin(angle) * y) / 2 * TEXTURE_PERIODS + phase
            return np.where(across % 1 < 0.5, 1.0, -1.0)
        case "grain":
            grains = rng.uniform(-1, 1, (GRAINS, GRAINS))
            rows, cols = (np.clip((axis + 1) / 2 * GRAINS, 0, GRAINS - 1).astype(int) for axis in (y, x))
            return grains[rows, cols]


def render(scene: Scene, config: WorldConfig = WorldConfig()) -> Float[np.ndarray, "3 h w"]:
    """Pixels float32 in [0, 1]; edges anti-aliased by 4 x 4 samples a pixel."""
    side, samples = config.image_size, 4
    points = (np.arange(side * samples) + 0.5) / (side * samples)
    pixels = np.empty((3, side, side), np.float32)
    pixels[:] = np.reshape(BACKGROUNDS[config.background], (3, 1, 1))

    def per_pixel(values: np.ndarray) -> np.ndarray:
        return values.reshape(side, samples, side, samples).mean(axis=(1, 3), dtype=np.float32)

    for thing in scene.things:
        x = ((points - thing.x) / (thing.size / 2))[None, :]
        y = ((points - thing.y) / (thing.size / 2))[:, None]
        x, y = np.broadcast_arrays(x, y)
        mask = inside(thing.shape, x, y) & (abs(x) <= 1) & (abs(y) <= 1)
        coverage = per_pixel(mask)
        colour = np.reshape(COLOURS[thing.colour], (3, 1, 1)).astype(np.float32)
        if config.texture is not None:
            brightness = per_pixel(mask * shade(config.texture, thing, x, y)) / np.maximum(coverage, 1e-6)
            colour = np.clip(colour * (1 + np.float32(TEXTURE_DEPTH) * brightness), 0, 1)
        pixels += coverage * (colour - pixels)
    return pixels


def to_uint8(pixels: Float[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels in [0, 1] -> bytes, rounded to nearest: truncation would darken every image by half a step."""
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
