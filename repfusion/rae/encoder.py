"""Pixels -> features: a frozen CLIP vision tower, one hidden layer, patch tokens only, LayerNorm without
affine (RAE, section 3).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from repfusion.rae.geometry import TowerGeometry, tower_config, tower_geometry

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def weights_digest(folder: str | Path) -> str:
    """sha256 over the names and bytes of a folder's safetensors files, hex.

    Raises:
        ValueError: where the folder holds none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder}: no *.safetensors files; expected a Hugging Face model folder (save_pretrained)"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class RepresentationEncoder(nn.Module):
    """Frozen tower with its pixel normalisation.

    Args: tower: a CLIPVisionModel, changed in place: layers above `layer` are dropped, positions are
    interpolated where the size asks for it. layer: the hidden state taken as features; -2, the penultimate,
    is LLaVA-1.5's choice. geometry: size of the images it takes, in px, and of its patches. mean, std: of the
    pixels' normalisation, per channel. digest: names the tower's weights.
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
        super().__init__()
        config = tower.config
        if not -config.num_hidden_layers <= layer <= -1:
            raise ValueError(
                f"layer {layer}: the tower has {config.num_hidden_layers} layers; use -1 to "
                f"{-config.num_hidden_layers}"
            )
        if geometry.image_size != config.image_size:
            interpolate_positions(tower, geometry)
        layers: Any = tower.encoder.layers
        tower.encoder.layers = layers[: config.num_hidden_layers + 1 + layer]
        self.tower = tower.eval().requires_grad_(False)
        self.layer = layer
        self.digest = digest
        self.image_size = geometry.image_size
        self.grid = geometry.grid
        self.feature_dim: int = config.hidden_size
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
        """Loads a CLIP vision folder, or the tower of a LLaVA folder. Pixel mean and std come from
        `preprocessor_config.json`.

        Args:
            folder: as written by save_pretrained.
            layer: the hidden state taken as features.
            dtype: in which the tower computes.
            image_size: side of the images in px, a multiple of the patch size; None is the tower's own.

        Raises:
            ValueError: where the folder is missing or holds another architecture, or has no such layer or
                size.
        """
        from transformers import CLIPVisionModel, LlavaForConditionalGeneration

        folder = Path(folder)
        kind, _ = tower_config(folder)
        geometry = tower_geometry(folder, image_size)
        if kind == "llava":
            tower = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).model.vision_tower
        else:
            tower = CLIPVisionModel.from_pretrained(folder, dtype=dtype)
        mean, std = list(CLIP_MEAN), list(CLIP_STD)
        preprocessor = folder / "preprocessor_config.json"
        if preprocessor.is_file():
            fields = json.loads(preprocessor.read_text())
            mean, std = fields.get("image_mean", mean), fields.get("image_std", std)
        return cls(tower, layer, geometry, mean, std, weights_digest(folder))

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Features float32, zero mean and unit variance over each token's channels.

        Raises:
            ValueError: for another image size than the encoder's, or values outside [0, 1].
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size}"
            raise ValueError(
                f"pixels are {pixels.shape[-2]} x {pixels.shape[-1]}, the encoder takes {expected}; "
                "resize in 'ingest'"
            )
        low, high = pixels.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels are in [{low:g}, {high:g}], expected [0, 1]; divide 8-bit values by 255"
            )
        return self._features(pixels)

    @torch.no_grad()
    def encode_images(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """As `forward`, of 8-bit images of the encoder's size; nothing here waits for a GPU to have
        finished.
        """
        return self._features(images.permute(0, 3, 1, 2).float().div(255))

    @torch.no_grad()
    def _features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        normalised = ((pixels - self.mean) / self.std).to(self.tower.dtype)
        hidden = self.tower(pixel_values=normalised).last_hidden_state
        return F.layer_norm(hidden[:, 1:].float(), (self.feature_dim,))


def interpolate_positions(tower: nn.Module, geometry: TowerGeometry) -> None:
    """Gives a tower the positions of another grid, as its `interpolate_pos_encoding` computes them at every
    call (bicubic); here it is done once.
    """
    embeddings, size = tower.embeddings, geometry.image_size
    num_patches = geometry.grid[0] * geometry.grid[1]
    tokens = embeddings.class_embedding.expand(1, num_patches + 1, -1)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(tokens, size, size)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(positions)
    embeddings.position_ids = torch.arange(num_patches + 1).expand(1, -1)
    embeddings.image_size = tower.config.image_size = size
    embeddings.num_patches, embeddings.num_positions = num_patches, num_patches + 1
