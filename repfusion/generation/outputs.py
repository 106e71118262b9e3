"""Images or clips -> one file with all images in rows, or a folder with a file of each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from repfusion.generation.prompts import PromptRow

SIDE_PX = 512
"""About the side of an image as it is shown, where small ones are enlarged."""
MAX_SIDE_PX = 65_000
"""The longest side of a picture: beyond it JPEG cannot go, and no viewer shows the others."""
PAPER = 255
CLIP = ".mp4"
"""The ending of a clip's file."""


@dataclass(frozen=True)
class Output:
    """Where images go: a picture with a row for each prompt, or a folder with a file for each image."""

    path: Path
    is_folder: bool

    @classmethod
    def parse(cls, text: str) -> "Output":
        """`FILE.png`, whose ending says the format, `FILE.mp4`, or `FOLDER/`.

        Raises:
            ValueError: an ending that is no format of images or clips, or a place that cannot be written.
        """
        path = Path(text)
        is_folder = text.endswith(("/", os.sep)) or path.is_dir()
        if not is_folder and path.suffix.lower() != CLIP:
            check_format(path)
        above = path if is_folder else path.parent
        there = next(one for one in (above, *above.resolve().parents) if os.path.lexists(one))
        if not there.is_dir() or not os.access(there, os.W_OK):
            what = "cannot be written" if there.is_dir() else "is no folder"
            raise ValueError(f"--out {text}: {there} {what}; choose another place")
        return cls(path, is_folder)

    @property
    def is_clip(self) -> bool:
        """Whether it is the file of one clip."""
        return not self.is_folder and self.path.suffix.lower() == CLIP

    def files(self, rows: Sequence[PromptRow]) -> list[tuple[Path, list[PromptRow]]]:
        """The files of images that are written, and what each shows."""
        if not self.is_folder:
            return [(self.path, list(rows))]
        digits = len(str(len(rows) - 1))
        return [
            (self.path / f"{number:0{digits}d}_seed{seed}.png", [PromptRow(row.prompt, (seed,))])
            for number, row in enumerate(rows)
            for seed in row.seeds
        ]


def check_format(path: Path) -> None:
    """Raises ValueError where a file's ending is none that images are written with."""
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        what = f"the ending {path.suffix!r} is no format of images" if path.suffix else "has no ending"
        raise ValueError(f"--out {path}: {what}; expected FILE.png, .jpg or .webp, or FOLDER/")


def fitting_scale(side_px: int, wanted: int | None) -> int:
    """How much an image of this side is enlarged: as wanted, or to about 512 px.

    Raises:
        ValueError: it is wanted less than once.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"--scale {wanted}: expected at least 1")
    return max(1, SIDE_PX // side_px) if wanted is None else wanted


def check_size(rows: Sequence[PromptRow], side_px: int) -> None:
    """Raises ValueError where a picture of these rows, of images of that side, is too large."""
    width, height = max(len(row.seeds) for row in rows) * side_px, len(rows) * side_px
    if max(width, height) > MAX_SIDE_PX:
        raise ValueError(
            f"a picture of {width} x {height} px; expected at most {MAX_SIDE_PX} a side: "
            "write to FOLDER/, or lower --scale"
        )


def grid(images: Sequence[UInt8[np.ndarray, "h w 3"]], widths: Sequence[int], scale: int) -> Image.Image:
    """Rows of `widths[i]` images each, one after the other; white where a row is shorter than others.
    Pixels are enlarged to scale x scale, without smoothing.
    """
    height, width, _ = images[0].shape
    paper = np.full((len(widths) * height, max(widths) * width, 3), PAPER, np.uint8)
    start = 0
    for row, number in enumerate(widths):
        strip = np.concatenate(list(images[start : start + number]), axis=1)
        paper[row * height : (row + 1) * height, : strip.shape[1]] = strip
        start += number
    size = paper.shape[1] * scale, paper.shape[0] * scale
    return Image.fromarray(paper).resize(size, Image.Resampling.NEAREST)
