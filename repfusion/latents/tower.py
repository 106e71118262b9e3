"""Pixels -> features: a frozen vision tower, one hidden state, patch tokens only, LayerNorm without affine
(RAE, section 3).

`layer` -1 is the output of the last block, before the tower's final norm: RAE takes that norm without its
affine, which is the normalisation that every layer gets here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.files import weights_digest
from repfusion.latents.encoder import Encoding, PixelEncoder
from repfusion.latents.geometry import LatentGeometry, TowerGeometry, tower_config, tower_geometry
from repfusion.latents.statistics import TokenScale
from repfusion.pretrained.config import processor_fields
from repfusion.pretrained.weights import load_transformers

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXEL_STATISTICS = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
}
"""Mean and standard deviation with which a family was trained, for folders that do not say."""
BESIDE = {
    "clip": r"text_model\.|text_projection\.|visual_projection\.|logit_scale$",
    "siglip": r"text_model\.|logit_scale$|logit_bias$",
    "clip_vision_model": r"visual_projection\.",
    "siglip_vision_model": r"classifier\.",
    "dinov2": r"classifier\.",
    "dinov2_with_registers": r"classifier\.",
}
"""Names of weights that may lie beside a tower's, by the folder's `model_type`."""


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
        on_meta: bool = False,
    ) -> "RepresentationEncoder":
        """Loads a vision folder, or the tower of a CLIP, SigLIP or LLaVA folder. Pixel mean and std come from
        its image processor's file, else from the family.

        Args:
            folder: as written by save_pretrained.
            layer: the hidden state taken as features.
            dtype: in which the tower computes.
            image_size: side of the images in px, a multiple of the patch size; None is the tower's own.
            on_meta: shapes without memory, and no digest: of the weights the headers alone are read.

        Raises: ValueError: where the folder is missing or holds another architecture, has no such layer or
            size, or weights are missing, left over or of another shape.
        """
        folder = Path(folder)
        geometry = tower_geometry(folder, image_size)
        statistics = pixel_statistics(folder)
        tower = load_tower(folder, torch.float32, on_meta)
        made = cls(tower, layer, geometry, *statistics, "none" if on_meta else weights_digest(folder))
        made.tower.to(dtype)  # once its positions are interpolated, in float32
        return made

    def _encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Encoding:
        """Features have zero mean and unit variance over each token's channels."""
        normalised = ((pixels - self.mean) / self.std).to(self.tower.dtype)
        hidden = self.tower(pixel_values=normalised).last_hidden_state
        patches = hidden[:, self.num_other_tokens :].float()
        eps = self.tower.config.layer_norm_eps
        # what F.layer_norm calls; this one says by what it divided
        normed = torch.native_layer_norm(patches, (self.feature_dim,), None, None, eps)
        features, mean, inverse_std = normed
        return Encoding(features, TokenScale(mean[..., 0], inverse_std[..., 0].reciprocal()))


def load_tower(folder: Path, dtype: torch.dtype, on_meta: bool = False) -> nn.Module:
    """The vision tower of a folder; what else lies there is left out.

    Raises:
        ValueError: weights are missing, left over, of another shape or not finite.
    """
    import transformers

    kind, vision = tower_config(folder)
    match "llava" if kind == "llava" else vision["model_type"]:
        case "llava":
            model_class: Any = transformers.LlavaForConditionalGeneration
        case "clip_vision_model":
            model_class = transformers.CLIPVisionModel
        case "siglip_vision_model":
            model_class = transformers.SiglipVisionModel
        case "dinov2":
            model_class = transformers.Dinov2Model
        case _:
            model_class = transformers.Dinov2WithRegistersModel
    loaded = load_transformers(model_class, folder, "encoder", dtype, BESIDE.get(kind), on_meta)
    return loaded.model.vision_tower if kind == "llava" else loaded


def pixel_statistics(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, per channel, by which the folder's image processor normalises pixels in
    [0, 1]. What its file leaves out, or gives as null, is the family's: transformers takes its default for
    both.

    Raises:
        ValueError: the file is damaged, or what it says is no normalisation.
    """
    fields, name = processor_fields(folder, "encoder")
    mean, std = PIXEL_STATISTICS[tower_config(folder)[1]["model_type"]]
    scale = 255 * _rescaling(fields, folder / name)
    if fields.get("do_normalize", True) is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean = _channels(fields, "image_mean", mean, folder / name)
        std = _channels(fields, "image_std", std, folder / name)
    if math.isclose(scale, 1):
        return list(mean), list(std)
    return [value / scale for value in mean], [value / scale for value in std]


def _rescaling(fields: Mapping[str, Any], path: Path) -> float:
    """What 8-bit values are multiplied by."""
    if fields.get("do_rescale", True) is False:
        return 1.0
    factor = fields.get("rescale_factor")
    factor = 1 / 255 if factor is None else factor
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(
            f"encoder folder {path.parent}: {path.name}: rescale_factor {factor!r}; expected 1/255"
        )
    return float(factor)


def _channels(
    fields: Mapping[str, Any], field: str, default: Sequence[float], path: Path
) -> tuple[float, ...]:
    """A number for each of the three channels; a single one stands for all."""
    value = fields.get(field)
    value = list(default) if value is None else value
    value = [value] * 3 if isinstance(value, int | float) else value
    is_numbers = (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    )
    if not is_numbers or (field == "image_std" and min(value) <= 0):
        raise ValueError(
            f"encoder folder {path.parent}: {path.name}: {field} {value!r}; expected three numbers"
            + (" above 0" if field == "image_std" else "")
        )
    return tuple(map(float, value))


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
