"""A vision tower's folder -> the size of its images and its grid of patches, from config.json alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOWERS = ("clip_vision_model", "clip", "llava")
"""Architectures that hold a CLIP vision tower."""

CLIP_DEFAULTS = {"image_size": 224, "patch_size": 32}
"""What transformers takes for a field that a config.json leaves out."""


@dataclass(frozen=True)
class TowerGeometry:
    """Square images of `image_size` px, cut into patches of `patch_size` px."""

    image_size: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


def tower_geometry(folder: str | Path, image_size: int | None = None) -> TowerGeometry:
    """The geometry at which a CLIP vision folder, or the tower of a LLaVA folder, is used; None is its own
    size.

    Raises:
        ValueError: where the folder is missing or holds another architecture, or where the size is no
            multiple of the patch size.
    """
    _, vision = tower_config(folder)
    patch_size = vision["patch_size"]
    if image_size is None:
        return TowerGeometry(vision["image_size"], patch_size)
    if image_size < 1 or image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise ValueError(
            f"encoder.image_size {image_size}: not a multiple of {patch_size}, the patch size of the tower "
            f"{folder}; the nearest one is {nearest}"
        )
    return TowerGeometry(image_size, patch_size)


def tower_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The model type of a folder and the fields of its vision tower.

    Raises:
        ValueError: where there is no config.json, or one of another architecture.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"encoder folder {folder}: no config.json; expected a folder written by save_pretrained"
        ) from error
    kind = config.get("model_type")
    vision = config if kind == "clip_vision_model" else config.get("vision_config")
    if kind not in TOWERS or vision is None:
        raise ValueError(
            f"encoder folder {folder}: model_type {kind!r}; expected 'clip_vision_model', 'clip' or 'llava' "
            "with a vision_config"
        )
    return kind, CLIP_DEFAULTS | vision
