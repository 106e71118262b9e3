"""An encoder's folder -> the size of its images, its grid and its channels, from config.json alone.

A folder is a vision tower of transformers (`model_type`), a dual encoder or LLaVA that holds one, or a VAE of
diffusers (`_class_name`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from repfusion.pretrained.config import read_config

TOWERS = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32, "hidden_size": 768},
    "siglip_vision_model": {"image_size": 224, "patch_size": 16, "hidden_size": 768},
    "dinov2": {"image_size": 224, "patch_size": 14, "hidden_size": 768},
    "dinov2_with_registers": {"image_size": 224, "patch_size": 16, "hidden_size": 768},
}
"""Vision towers, and what transformers takes for a field that their config.json leaves out."""
HOLDERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "llava": "clip_vision_model"}
"""Models with a tower in `vision_config`, and its type where that does not say."""
VAES = {
    "AutoencoderKL": {"block_out_channels": [64], "latent_channels": 4, "sample_size": 32},
    "AutoencoderDC": {
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "latent_channels": 32,
        "sample_size": None,
    },
}
"""Classes of diffusers, and what it takes for a field that their config.json leaves out."""


class LatentGeometry(NamedTuple):
    """Side of the square images in px, rows and columns of latent tokens, channels of a token."""

    image_size: int
    grid: tuple[int, int]
    feature_dim: int


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


def latent_geometry(folder: str | Path, image_size: int | None = None) -> LatentGeometry:
    """The latent space of any encoder folder used at `image_size` px; None is its own size.

    Raises:
        ValueError: where the folder is missing or holds another architecture, or where the size is no
            multiple of its patch or factor (or is not given, and a VAE names none of its own).
    """
    if not is_vae(folder):
        tower = tower_geometry(folder, image_size)
        return LatentGeometry(tower.image_size, tower.grid, tower_config(folder)[1]["hidden_size"])
    config = vae_config(folder)
    factor = vae_factor(config)
    size = config["sample_size"] if image_size is None else image_size
    if size is None:
        raise ValueError(
            f"encoder folder {folder}: an {config['_class_name']} has no size of its own; set "
            f"encoder.image_size to a multiple of {factor}"
        )
    side = check_size(size, factor, f"the factor of the VAE {folder}") // factor
    return LatentGeometry(size, (side, side), config["latent_channels"])


def tower_geometry(folder: str | Path, image_size: int | None = None) -> TowerGeometry:
    """The geometry at which a vision folder, or the tower of a model that holds one, is used; None is its own
    size.

    Raises:
        ValueError: where the folder is missing or holds another architecture, or where the size is no
            multiple of the patch size.
    """
    _, vision = tower_config(folder)
    patch_size = vision["patch_size"]
    if image_size is None:
        return TowerGeometry(vision["image_size"], patch_size)
    return TowerGeometry(
        check_size(image_size, patch_size, f"the patch size of the tower {folder}"), patch_size
    )


def check_size(image_size: int, step: int, what: str) -> int:
    if image_size < 1 or image_size % step:
        nearest = max(1, round(image_size / step)) * step
        raise ValueError(
            f"encoder.image_size {image_size}: not a multiple of {step}, {what}; the nearest one is {nearest}"
        )
    return image_size


def tower_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The model type of a folder and the fields of its vision tower, its own `model_type` among them.

    Raises:
        ValueError: where there is no config.json, or one of another architecture.
    """
    config = read_config(folder, "encoder")
    kind = config.get("model_type")
    if kind in TOWERS:
        return kind, TOWERS[kind] | config
    vision = config.get("vision_config")
    if kind in HOLDERS and isinstance(vision, dict):
        tower = vision.get("model_type", HOLDERS[kind])
        if tower in TOWERS:
            return kind, TOWERS[tower] | vision | {"model_type": tower}
        kind = f"{kind} over {tower}"
    raise ValueError(
        f"encoder folder {folder}: model_type {kind!r}; expected one of {', '.join(TOWERS)}, or "
        f"{', '.join(HOLDERS)} with a vision_config of these, or a VAE ({', '.join(VAES)})"
    )


def is_vae(folder: str | Path, what: str = "encoder") -> bool:
    """Whether a folder, which messages call a `what` folder, holds a VAE of diffusers. Raises ValueError
    where there is no config.json.
    """
    return read_config(folder, what).get("_class_name") in VAES


def vae_config(folder: str | Path) -> dict[str, Any]:
    """The fields of a VAE folder. Raises ValueError where it holds something else."""
    config = read_config(folder, "VAE")
    if (name := config.get("_class_name")) not in VAES:
        raise ValueError(f"VAE folder {folder}: _class_name {name!r}; expected one of {', '.join(VAES)}")
    return VAES[name] | config


def vae_factor(config: dict[str, Any]) -> int:
    """Side in px of the square that a latent token stands for: each stage but the last halves the image."""
    name = "block_out_channels" if config["_class_name"] == "AutoencoderKL" else "encoder_block_out_channels"
    return 2 ** (len(config[name]) - 1)
