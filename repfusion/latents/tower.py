"""Pixels -> features: a frozen vision tower, one hidden state, patch tokens only, LayerNorm without affine
(RAE, section 3).

`layer` -1 is the output of the last block, before the tower's final norm: RAE takes that norm without its
affine, which is the normalisation that every layer gets here.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.files import weights_digest
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.geometry import LatentGeometry, TowerGeometry, tower_config, tower_geometry

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXEL_STATISTICS = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
}
"""Mean and standard deviation with which a family was trained, for folders that do not say."""


class RepresentationEncoder(PixelEncoder):
    """Frozen tower with its pixel normalisation.

    Args: tower: a vision model of transformers, changed in place: layers above `layer` and the final norm are
    dropped, positions are interpolated where the size asks for it. layer: the hidden state taken as features;
    -2, the penultimate, is LLaVA-1.5's choice. geometry: size of the images it takes, in px, and of its
    patches. mean, std: of the pixels' normalisation, per channel. digest: names the tower's weights.
    """

    def __init__(
        self,
        tower: nn.Module,
        layer: int,
        geometry: TowerGeometry,
        mean: list[float],
        std: list[float],
        digest: str,
    ):
        config = tower.config
        super().__init__(LatentGeometry(geometry.image_size, geometry.grid, config.hidden_size), digest)
        if not -config.num_hidden_layers <= layer <= -1:
            raise ValueError(
                f"layer {layer}: the tower has {config.num_hidden_layers} layers; use -1 to "
                f"{-config.num_hidden_layers}"
            )
        if geometry.image_size != config.image_size:
            interpolate_positions(tower, geometry)
        self.num_other_tokens = drop_above(tower, config.num_hidden_layers + 1 + layer)
        self.tower = tower.eval().requires_grad_(False)
        self.layer = layer
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        layer: int = -2,
        dtype: torch.dtype = torch.float32,
        image_size: int | None = None,
    ) -> "RepresentationEncoder":
        """Loads a vision folder, or the tower of a CLIP, SigLIP or LLaVA folder. Pixel mean and std come from
        its image processor's file, else from the family.

        Args:
            folder: as written by save_pretrained.
            layer: the hidden state taken as features.
            dtype: in which the tower computes.
            image_size: side of the images in px, a multiple of the patch size; None is the tower's own.

        Raises:
            ValueError: where the folder is missing or holds another architecture, or has no such layer or
                size, or lacks weights.
        """
        folder = Path(folder)
        geometry = tower_geometry(folder, image_size)
        tower = load_tower(folder, dtype)
        return cls(tower, layer, geometry, *pixel_statistics(folder), weights_digest(folder))

    def _features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Zero mean and unit variance over each token's channels."""
        normalised = ((pixels - self.mean) / self.std).to(self.tower.dtype)
        hidden = self.tower(pixel_values=normalised).last_hidden_state
        eps = self.tower.config.layer_norm_eps
        return F.layer_norm(hidden[:, self.num_other_tokens :].float(), (self.feature_dim,), eps=eps)


def load_tower(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Raises ValueError where weights are missing, which transformers would draw at random."""
    import transformers

    kind, vision = tower_config(folder)
    match "llava" if kind == "llava" else vision["model_type"]:
        case "llava":
            model: Any = transformers.LlavaForConditionalGeneration
        case "clip_vision_model":
            model = transformers.CLIPVisionModel
        case "siglip_vision_model":
            model = transformers.SiglipVisionModel
        case "dinov2":
            model = transformers.Dinov2Model
        case _:
            model = transformers.Dinov2WithRegistersModel
    loaded, report = model.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"encoder folder {folder}: no weights for {missing[:4]} ({len(missing)} in all)")
    return loaded.model.vision_tower if kind == "llava" else loaded


def pixel_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, per channel, by which the folder's image processor normalises pixels."""
    fields: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            fields = json.loads((folder / name).read_text())
            fields = fields.get("image_processor", fields)
            break
    mean, std = PIXEL_STATISTICS[tower_config(folder)[1]["model_type"]]
    return fields.get("image_mean", list(mean)), fields.get("image_std", list(std))


def drop_above(tower: nn.Module, num_layers: int) -> int:
    """Leaves a tower its first layers, and takes away what its `last_hidden_state` goes through after them;
    returns how many tokens stand before the patches.
    """
    encoder: Any = tower.encoder
    match tower.config.model_type:
        case "clip_vision_model":
            encoder.layers = encoder.layers[:num_layers]
            return 1
        case "siglip_vision_model":
            encoder.layers = encoder.layers[:num_layers]
            tower.post_layernorm, tower.use_head, tower.head = nn.Identity(), False, None
            return 0
        case _:
            encoder.layer = encoder.layer[:num_layers]
            tower.layernorm = nn.Identity()
            return 1 + getattr(tower.config, "num_register_tokens", 0)


def interpolate_positions(tower: nn.Module, geometry: TowerGeometry) -> None:
    """Gives a tower the positions of another grid, as its `interpolate_pos_encoding` computes them at every
    call (bicubic); here it is done once.
    """
    embeddings, size, width = tower.embeddings, geometry.image_size, tower.config.hidden_size
    num_patches = geometry.grid[0] * geometry.grid[1]
    num_positions = num_patches + (tower.config.model_type != "siglip_vision_model")
    with torch.no_grad():
        tokens = next(embeddings.parameters()).new_empty(1, num_positions, width)
        positions = embeddings.interpolate_pos_encoding(tokens, size, size)[0]
    tower.config.image_size = size
    if tower.config.model_type.startswith("dinov2"):
        embeddings.position_embeddings = nn.Parameter(positions[None])
        return
    embeddings.position_embedding = nn.Embedding.from_pretrained(positions)
    embeddings.position_ids = torch.arange(num_positions).expand(1, -1)
    embeddings.image_size = size
    embeddings.num_patches, embeddings.num_positions = num_patches, num_positions
