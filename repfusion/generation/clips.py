"""Clips -> files: an mp4 of each and a contact sheet beside it, which carries the lineage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from repfusion.generation.outputs import CLIP, Output
from repfusion.generation.prompts import PromptRow
from repfusion.lineage.describe import png_info
from repfusion.video.sheets import contact_sheet


def clip_files(output: Output, rows: Sequence[PromptRow]) -> list[tuple[Path, PromptRow]]:
    """The mp4 of each clip, and what it shows.

    Raises:
        ValueError: the output is a picture, or one file for several clips.
    """
    if output.is_folder:
        return [(path.with_suffix(CLIP), shown[0]) for path, shown in output.files(rows)]
    if not output.is_clip:
        raise ValueError(f"--out {output.path}: the model draws clips; expected FILE{CLIP} or FOLDER/")
    if (num := sum(len(row.seeds) for row in rows)) != 1:
        raise ValueError(f"--out {output.path}: {num} clips in one file; write to FOLDER/")
    return [(output.path, rows[0])]


def save_clip(
    frames: UInt8[np.ndarray, "f h w 3"], rate: float, path: Path, record: dict[str, Any] | None
) -> None:
    """Writes the mp4, lossless, at `rate` frames a second, and FILE.png beside it, all frames in a row, which
    carries the record where there is one.
    """
    from repfusion.video.files import encode_clip  # PyAV is needed where there are clips alone

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_clip(frames, rate))
    options = {"pnginfo": png_info(record)} if record else {}
    Image.fromarray(contact_sheet(frames)).save(path.with_suffix(".png"), **options)


def enlarged(frames: UInt8[np.ndarray, "f h w 3"], scale: int) -> UInt8[np.ndarray, "f _ _ 3"]:
    """Frames whose pixels are scale x scale, without smoothing."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
