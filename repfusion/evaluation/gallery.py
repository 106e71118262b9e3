"""Images, their prompts and whether they are right -> one picture a person can look at."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from repfusion.generate import to_uint8

PAPER, INK, FAINT = (250, 250, 248), (38, 38, 42), (128, 128, 134)
RIGHT, WRONG = (38, 140, 78), (200, 58, 48)
TILE_PX, MAX_TILE_PX = 128, 256
GAP_PX = 14
FRAME_PX = 3


def wrap(text: str, width_px: int, measure: Callable[[str], float]) -> list[str]:
    """Lines of whole words no wider than `width_px`; a word that is wider alone gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and measure(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _tile(image: Float[np.ndarray, "3 h w"], side_px: int) -> Image.Image:
    """Square tile; small images are enlarged without smoothing, so that every pixel of the model shows."""
    array = to_uint8(torch.from_numpy(image))
    method = Image.Resampling.NEAREST if array.shape[0] <= side_px else Image.Resampling.LANCZOS
    return Image.fromarray(array).resize((side_px, side_px), method)


def gallery(
    pixels: Float[np.ndarray, "b 3 h w"],
    prompts: list[str],
    marks: list[bool] | None = None,
    columns: int = 6,
    row_titles: list[str] | None = None,
) -> Image.Image:
    """Tiles in rows with the prompt under each, framed green where right and red where wrong.

    `marks` says which are right; None leaves the frames out. `row_titles` stand above the rows.

    Raises:
        ValueError: where images, prompts and marks differ in number, or there are none.
    """
    marks_or_none = [None] * len(prompts) if marks is None else marks
    if not len(pixels) == len(prompts) == len(marks_or_none) or not prompts:
        raise ValueError(
            f"{len(pixels)} images, {len(prompts)} prompts, {len(marks_or_none)} marks; expected as many"
        )
    side = pixels.shape[-1]
    tile_px = min(
        side * max(1, round(TILE_PX / side)), MAX_TILE_PX
    )  # whole multiples keep small images crisp
    font, title_font = ImageFont.load_default(13), ImageFont.load_default(15)
    line_px, title_px = 17, 26 if row_titles else 0
    captions = [wrap(prompt, tile_px, font.getlength) for prompt in prompts]
    columns = min(columns, len(prompts))
    rows = [range(start, min(start + columns, len(prompts))) for start in range(0, len(prompts), columns)]
    heights = [title_px + tile_px + 8 + line_px * max(len(captions[i]) for i in row) + GAP_PX for row in rows]
    picture = Image.new("RGB", (GAP_PX + columns * (tile_px + GAP_PX), GAP_PX + sum(heights)), PAPER)
    draw = ImageDraw.Draw(picture)
    top = GAP_PX
    for number, row in enumerate(rows):
        if row_titles and number < len(row_titles):
            draw.text((GAP_PX, top), row_titles[number], FAINT, title_font)
        for column, index in enumerate(row):
            x, y = GAP_PX + column * (tile_px + GAP_PX), top + title_px
            picture.paste(_tile(pixels[index], tile_px), (x, y))
            mark = marks_or_none[index]
            if mark is not None:
                box = (x - FRAME_PX, y - FRAME_PX, x + tile_px + FRAME_PX - 1, y + tile_px + FRAME_PX - 1)
                draw.rectangle(box, outline=RIGHT if mark else WRONG, width=FRAME_PX)
            for line, text in enumerate(captions[index]):
                draw.text((x, y + tile_px + 6 + line * line_px), text, INK, font)
        top += heights[number]
    return picture
