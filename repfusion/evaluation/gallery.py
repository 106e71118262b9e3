"""Images, their captions and whether they are right -> one picture a person can look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (38, 38, 42), (128, 128, 134)
RIGHT, WRONG = (38, 140, 78), (200, 58, 48)
TILE_PX, MAX_TILE_PX = 128, 256
GAP_PX = 14
FRAME_PX = 3
LINE_PX, TITLE_PX = 17, 26


def wrap(text: str, width_px: int, measure: Callable[[str], float]) -> list[str]:
    """Lines of whole words no wider than `width_px`; a word that is wider alone gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class Tile:
    """An image, what it was drawn from, and whether it is right; None leaves its frame out."""

    image: UInt8[np.ndarray, "h w 3"]
    caption: str
    is_right: bool | None = None


TitledRow = tuple[str, Sequence[Tile]]
"""A title, which may be empty, and tiles."""


def gallery(rows: Sequence[TitledRow], columns: int = 6) -> Image.Image:
    """Tiles in rows with the caption under each, framed green where right and red where wrong. Titles stand
    above the rows; rows without one are filled up, `columns` tiles each.

    Raises:
        ValueError: where there are no tiles.
    """
    lines = [line for title, tiles in rows for line in _broken(title, tiles, columns)]
    if not lines:
        raise ValueError("a gallery of no tiles; expected at least one image")
    side = lines[0][1][0].image.shape[0]
    # whole multiples keep small images crisp
    tile_px = min(side * max(1, round(TILE_PX / side)), MAX_TILE_PX)
    font = ImageFont.load_default(13)
    captions = [[wrap(tile.caption, tile_px, font.getlength) for tile in tiles] for _, tiles in lines]
    title_px = TITLE_PX if any(title for title, _ in lines) else 0
    heights = [title_px + tile_px + 8 + LINE_PX * max(map(len, below)) + GAP_PX for below in captions]
    width = max(len(tiles) for _, tiles in lines)
    picture = Image.new("RGB", (GAP_PX + width * (tile_px + GAP_PX), GAP_PX + sum(heights)), PAPER)
    top = GAP_PX
    for (title, tiles), below, height in zip(lines, captions, heights, strict=True):
        ImageDraw.Draw(picture).text((GAP_PX, top), title, FAINT, ImageFont.load_default(15))
        for column, (tile, caption) in enumerate(zip(tiles, below, strict=True)):
            _paint(picture, tile, caption, (GAP_PX + column * (tile_px + GAP_PX), top + title_px), tile_px)
        top += height
    return picture


def _broken(title: str, tiles: Sequence[Tile], columns: int) -> list[TitledRow]:
    """A row broken into lines of `columns` tiles, the title above the first."""
    starts = range(0, len(tiles), columns)
    return [("" if start else title, tiles[start : start + columns]) for start in starts]


def _paint(
    picture: Image.Image, tile: Tile, caption: list[str], place: tuple[int, int], side_px: int
) -> None:
    """Image, frame and caption, the image's upper left corner at `place`."""
    (x, y), draw = place, ImageDraw.Draw(picture)
    picture.paste(_enlarged(tile.image, side_px), place)
    if tile.is_right is not None:
        box = (x - FRAME_PX, y - FRAME_PX, x + side_px + FRAME_PX - 1, y + side_px + FRAME_PX - 1)
        draw.rectangle(box, outline=RIGHT if tile.is_right else WRONG, width=FRAME_PX)
    for line, text in enumerate(caption):
        draw.text((x, y + side_px + 6 + line * LINE_PX), text, INK, ImageFont.load_default(13))


def _enlarged(image: UInt8[np.ndarray, "h w 3"], side_px: int) -> Image.Image:
    """A square tile; small images are enlarged without smoothing, so that every pixel of the model shows."""
    method = Image.Resampling.NEAREST if image.shape[0] <= side_px else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((side_px, side_px), method)
