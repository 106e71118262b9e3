"""Pixels -> the things they show -> whether they satisfy a prompt. Exact: no learned part.

A pixel belongs to the palette colour whose mixing line with the background it lies nearest to; its place on
that line is how much of it the thing covers. A connected component is then compared with every shape at the
area and centroid it would have, so size and place need no search. The rules per task are GenEval's (arXiv
2310.11513): extra things are forgiven except in counting, and a relation needs a clear offset.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from repfusion.scenes.captions import Prompt, Wanted
from repfusion.scenes.world import BACKGROUND, COLOURS, SHAPES, Colour, Relation, Shape, Thing, inside

COLOUR_NAMES: tuple[Colour, ...] = tuple(COLOURS)
MAX_COLOUR_ERROR = 0.22
"""Largest RGB distance of a pixel from a colour's mixing line."""
MIN_COVERAGE = 0.15
"""Less coverage than this is noise."""
CORE_LEVELS = (0.5, 0.7, 0.85)
"""Coverage that makes a pixel part of a component; the higher levels part things that blur has joined."""
MIN_SATURATION = 0.7
"""Typical coverage inside a thing; below it the colour is too faint to count as the colour."""
MIN_SIZE = 0.15
"""Smallest side of a thing, as a fraction of the image's side; smaller components are specks."""
MIN_MATCH = 0.8
"""Smallest soft intersection over union with the best shape."""
BLUR = 0.025
"""Blur a shape may show (standard deviation, fraction of the side): it is compared sharp and blurred."""
MIN_LEAD = 0.02
"""How far the best shape has to be ahead of the second."""
POSITION_MARGIN = 0.1
"""Share of the two sizes by which an offset is reduced before its direction counts (as in GenEval)."""


@dataclass(frozen=True)
class Finding:
    """Whether an image satisfies a prompt and, if not, the first fact that fails."""

    correct: bool
    reason: str = ""


@cache
def _shape_moments(shape: Shape) -> tuple[float, float]:
    """Area of the shape as a share of its box, and its centroid's offset downwards in box sides."""
    axis = (np.arange(400) + 0.5) / 200 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    mask = inside(shape, x, y)
    return float(mask.mean()), float(y[mask].mean() / 2)


def _palette() -> tuple[Float[np.ndarray, "c 3"], Float[np.ndarray, " c"]]:
    directions = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUND, np.float32)
    return directions, (directions**2).sum(axis=1)


def _segment(pixels: Float[np.ndarray, "3 h w"]) -> tuple[Int[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Index of each pixel's colour (-1: none, or background) and the share of the pixel it covers."""
    directions, squares = _palette()
    offset = pixels.astype(np.float32) - np.reshape(np.array(BACKGROUND, np.float32), (3, 1, 1))
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
            for shown in (template, blurred)
        )
        fits.append((match, Thing(shape, colour, x / side, y / side, size / side)))
    fits.sort(key=lambda fit: -fit[0])
    (best, thing), (second, _) = fits[:2]
    clear = best >= MIN_MATCH and best - second >= MIN_LEAD and thing.size >= MIN_SIZE
    return thing if clear else None


def _find(
    coverage: Float[np.ndarray, "h w"], colour: Colour, levels: tuple[float, ...] = CORE_LEVELS
) -> list[Thing]:
    """Things in a coverage map of one colour; a component that is no shape is tried at the next level."""
    level, *higher = levels
    labels, number = ndimage.label(coverage > level)
    if number == 0:
        return []
    smallest = min(_shape_moments(shape)[0] for shape in SHAPES) * (MIN_SIZE * coverage.shape[0]) ** 2
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


def _stands(first: Thing, relation: Relation, second: Thing) -> bool:
    """GenEval's rule: the offset, less a margin per axis, points within 60 degrees of the relation."""
    margin = POSITION_MARGIN * (first.size + second.size)
    offset = np.array([first.x - second.x, first.y - second.y])
    offset = np.sign(offset) * np.maximum(abs(offset) - margin, 0)
    length = float(np.linalg.norm(offset))
    if length == 0:
        return False
    dx, dy = offset / length
    match relation:
        case "left of":
            return bool(dx < -0.5)
        case "right of":
            return bool(dx > 0.5)
        case "above":
            return bool(dy < -0.5)
        case "below":
            return bool(dy > 0.5)


def check(things: list[Thing], prompt: Prompt) -> Finding:
    """Whether found things satisfy a prompt's facts, and the first that fails."""
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
        if not any(_stands(a, prompt.relation, b) for a, b in product(first, second)):
            return Finding(False, f"the first does not stand {prompt.relation} the second")
    return Finding(True)


def score_image(pixels: Float[np.ndarray, "3 h w"], prompt: Prompt) -> bool:
    """Whether an image (RGB in [0, 1]) shows what the prompt states."""
    return check(detect(pixels), prompt).correct
