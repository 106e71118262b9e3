"""Pixels -> the things they show -> whether they satisfy a prompt. Exact: no learned part.

The background is the named one nearest to the image's border, where no thing reaches. A pixel belongs to the
palette colour whose mixing line with the background it lies nearest to; its place on that line is how much of
it the thing covers. A connected component is then compared with every shape at the
area and centroid it would have, so size and place need no search. The rules per task are GenEval's (arXiv
2310.11513): extra things are forgiven except in counting, and a relation needs a clear offset. A stricter
rule of position, which GenEval lacks, takes no diagonal for a relation.

Exact means: every thing, colour and shape found and nothing else, in all renderings that were tried, at 64
and 96 px, of 2 to 4 cells along a side, on every background, with every texture. What blur does to that
depends on the things' size: a standard deviation of 1.9% of the side costs nothing with 2 cells, up to 5% of
images with 3, a third to a half with 4; 0.9% costs at most 2% with 4.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from repfusion.scenes.captions import Prompt, Wanted
from repfusion.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Background,
    Colour,
    Relation,
    Shape,
    Thing,
    inside,
)

COLOUR_NAMES: tuple[Colour, ...] = tuple(COLOURS)
MAX_COLOUR_ERROR = 0.22
"""Largest RGB distance of a pixel from a colour's mixing line."""
MIN_COVERAGE = 0.15
"""Less coverage than this is noise."""
CORE_LEVELS = (0.5, 0.7, 0.85)
"""Coverage that makes a pixel part of a component; the higher levels part things that blur has joined."""
MIN_SATURATION = 0.7
"""Typical coverage inside a thing; below it the colour is too faint to count as the colour."""
MIN_SIZE = 0.09
"""Smallest side of a thing, as a fraction of the image's side; smaller components are specks."""
MIN_SIZE_PX = 4.8
"""Smallest side of a thing in pixels: fewer do not show a shape."""
MIN_MATCH = 0.8
"""Smallest soft intersection over union with the best shape."""
BLUR = 0.025
"""Blur a shape may show (standard deviation, fraction of the side): it is compared sharp, blurred and half
blurred.
"""
MIN_LEAD = 0.02
"""How far the best shape has to be ahead of the second."""
POSITION_MARGIN = 0.1
"""Share of the two sizes by which an offset is reduced before its direction counts (as in GenEval)."""
STRICT_SLOPE = 0.5
"""Largest offset across a relation, as a share of that along it, for the strict rule: within 27 degrees."""


@dataclass(frozen=True)
class Finding:
    """Whether an image satisfies a prompt and, if not, the first fact that fails."""

    correct: bool
    reason: str = ""


def background_of(pixels: Float[np.ndarray, "3 h w"]) -> Background:
    """The named background nearest to the median of the image's outermost pixels."""
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    distances = ((np.array(list(BACKGROUNDS.values())) - np.median(border, axis=1)) ** 2).sum(axis=1)
    return tuple(BACKGROUNDS)[distances.argmin()]


@cache
def _shape_moments(shape: Shape) -> tuple[float, float]:
    """Area of the shape as a share of its box, and its centroid's offset downwards in box sides."""
    axis = (np.arange(400) + 0.5) / 200 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    mask = inside(shape, x, y)
    return float(mask.mean()), float(y[mask].mean() / 2)


@cache
def _palette(background: Background) -> tuple[Float[np.ndarray, "c 3"], Float[np.ndarray, " c"]]:
    directions = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUNDS[background], np.float32)
    return directions, (directions**2).sum(axis=1)


def _min_size_px(side: int) -> float:
    return max(MIN_SIZE * side, MIN_SIZE_PX)


def _segment(pixels: Float[np.ndarray, "3 h w"]) -> tuple[Int[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Index of each pixel's colour (-1: none, or background) and the share of the pixel it covers."""
    background = background_of(pixels)
    directions, squares = _palette(background)
    offset = pixels.astype(np.float32) - np.reshape(np.array(BACKGROUNDS[background], np.float32), (3, 1, 1))
    coverage = np.tensordot(directions / squares[:, None], offset, axes=1)
    # |offset - coverage * direction|^2 with coverage held to [0, 1], without a [c, 3, h, w] array
    coverage = np.clip(coverage, 0, 1)
    dots = np.tensordot(directions, offset, axes=1)
    error = (offset**2).sum(axis=0) - 2 * coverage * dots + coverage**2 * squares[:, None, None]
    colour = error.argmin(axis=0)
    nearest = colour[None]
    own_coverage = np.take_along_axis(coverage, nearest, axis=0)[0]
    own_error = np.take_along_axis(error, nearest, axis=0)[0]
    is_none = (own_error > MAX_COLOUR_ERROR**2) | (own_coverage < MIN_COVERAGE)
    return np.where(is_none, -1, colour), np.where(is_none, np.float32(0), own_coverage)


def _template(
    shape: Shape, x: float, y: float, size: float, window: tuple[slice, slice]
) -> Float[np.ndarray, "h w"]:
    """Coverage by a shape of centre and size in pixels, over a window of the image."""
    samples = 4 if size < 24 else 2
    rows, cols = (
        (np.arange(side.start * samples, side.stop * samples) + 0.5) / samples
        for side in (window[0], window[1])
    )
    v, u = np.meshgrid((rows - y) / (size / 2), (cols - x) / (size / 2), indexing="ij")
    mask = inside(shape, u, v)
    return mask.reshape(len(rows) // samples, samples, -1, samples).mean(axis=(1, 3), dtype=np.float32)


def _fit(coverage: Float[np.ndarray, "h w"], colour: Colour) -> Thing | None:
    """The thing that a component's coverage shows; None where no shape matches well and alone."""
    side = coverage.shape[0]
    area = float(coverage.sum())
    rows, cols = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    centre_x, centre_y = float(coverage.sum(axis=0) @ cols) / area, float(coverage.sum(axis=1) @ rows) / area
    occupied = np.nonzero(coverage.any(axis=1))[0], np.nonzero(coverage.any(axis=0))[0]
    fits: list[tuple[float, Thing]] = []
    for shape in SHAPES:
        share, drop = _shape_moments(shape)
        size = (area / share) ** 0.5
        x, y = centre_x, centre_y - drop * size
        window = tuple(
            slice(
                max(0, min(int(found[0]), int(centre - size / 2) - 1)),
                min(side, max(int(found[-1]) + 1, int(centre + size / 2) + 2)),
            )
            for found, centre in zip(occupied, (y, x), strict=True)
        )
        template, own = _template(shape, x, y, size, (window[0], window[1])), coverage[window]
        blurred = ndimage.gaussian_filter(template, BLUR * side, mode="constant")
        match = max(
            float(np.minimum(shown, own).sum() / np.maximum(shown, own).sum())
            for shown in (template, (template + blurred) / 2, blurred)
        )
        fits.append((match, Thing(shape, colour, x / side, y / side, size / side)))
    fits.sort(key=lambda fit: -fit[0])
    (best, thing), (second, _) = fits[:2]
    clear = best >= MIN_MATCH and best - second >= MIN_LEAD and thing.size * side >= _min_size_px(side)
    return thing if clear else None


def _find(
    coverage: Float[np.ndarray, "h w"], colour: Colour, levels: tuple[float, ...] = CORE_LEVELS
) -> list[Thing]:
    """Things in a coverage map of one colour; a component that is no shape is tried at the next level."""
    level, *higher = levels
    labels, number = ndimage.label(coverage > level)
    if number == 0:
        return []
    smallest = min(_shape_moments(shape)[0] for shape in SHAPES) * _min_size_px(coverage.shape[0]) ** 2
    areas = np.bincount(labels.ravel())
    kept = [index for index in range(1, number + 1) if areas[index] >= 0.5 * smallest]
    if not kept:
        return []
    # Each pixel goes to its nearest component, so that blurred edges stay with their thing.
    distance, (rows, cols) = ndimage.distance_transform_edt(~np.isin(labels, kept), return_indices=True)
    owner = labels[rows, cols]
    things: list[Thing] = []
    for index in kept:
        own = np.where((owner == index) & (distance <= 2.5), coverage, np.float32(0))
        if np.median(own[own > level]) < MIN_SATURATION:
            continue
        thing = _fit(own, colour)
        if thing is not None:
            things.append(thing)
        elif higher:
            things += _find(own, colour, tuple(higher))
    return things


def detect(pixels: Float[np.ndarray, "3 h w"]) -> list[Thing]:
    """The things in a square image (RGB in [0, 1]), by colour; centres and sizes are fractions of the side.

    Raises:
        ValueError: where the image is not square or not finite.
    """
    if pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"the detector needs square images, got {pixels.shape[2]} x {pixels.shape[1]} px")
    if not np.isfinite(pixels).all():
        raise ValueError("the image holds values that are not finite")
    colours, coverage = _segment(pixels)
    things: list[Thing] = []
    for index in np.unique(colours[coverage > CORE_LEVELS[0]]):
        things += _find(np.where(colours == index, coverage, np.float32(0)), COLOUR_NAMES[index])
    return things


def _fits(thing: Thing, want: Wanted) -> bool:
    return thing.shape == want.shape and want.colour in (None, thing.colour)


def _offset(first: Thing, relation: Relation, second: Thing) -> tuple[float, float]:
    """How far the first thing stands from the second along the relation (negative: the other way) and across
    it, each less the margin.
    """
    margin = POSITION_MARGIN * (first.size + second.size)
    offset = np.array([first.x - second.x, first.y - second.y])
    dx, dy = (np.sign(offset) * np.maximum(abs(offset) - margin, 0)).tolist()
    match relation:
        case "left of":
            return -dx, abs(dy)
        case "right of":
            return dx, abs(dy)
        case "above":
            return -dy, abs(dx)
        case "below":
            return dy, abs(dx)


def _stands(first: Thing, relation: Relation, second: Thing) -> bool:
    """GenEval's rule: the offset points within 60 degrees of the relation. A diagonal satisfies two."""
    along, across = _offset(first, relation, second)
    return along > 0.5 * float(np.hypot(along, across))


def _stands_strictly(first: Thing, relation: Relation, second: Thing) -> bool:
    """The two stand in a row or a column: the offset along the relation is more than twice that across it.
    A diagonal satisfies none.
    """
    along, across = _offset(first, relation, second)
    return across < STRICT_SLOPE * along


def check(things: list[Thing], prompt: Prompt, is_strict: bool = False) -> Finding:
    """Whether found things satisfy a prompt's facts, and the first that fails. `is_strict` takes no diagonal
    for a relation.
    """
    for want in prompt.wanted:
        look = f"{want.colour + ' ' if want.colour else ''}{want.shape}"
        if not any(_fits(thing, want) for thing in things):
            if any(thing.shape == want.shape for thing in things):
                return Finding(False, f"no {look}: the {want.shape} has another colour")
            return Finding(False, f"no {look}")
        # Counting is exact: things of the shape in another colour are too many as well.
        number = sum(thing.shape == want.shape for thing in things)
        if prompt.task == "counting" and (
            number != want.number or not all(_fits(t, want) for t in things if t.shape == want.shape)
        ):
            return Finding(
                False, f"{number} of {want.number} things of the shape {want.shape}, or in another colour"
            )
    if prompt.relation is not None:
        first, second = ([thing for thing in things if _fits(thing, want)] for want in prompt.wanted)
        stands = _stands_strictly if is_strict else _stands
        if not any(stands(a, prompt.relation, b) for a, b in product(first, second)):
            return Finding(False, f"the first does not stand {prompt.relation} the second")
    return Finding(True)


def score_image(pixels: Float[np.ndarray, "3 h w"], prompt: Prompt) -> bool:
    """Whether an image (RGB in [0, 1]) shows what the prompt states."""
    return check(detect(pixels), prompt).correct
