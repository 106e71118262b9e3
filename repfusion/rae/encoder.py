"""Pixels -> features: a frozen CLIP vision tower, one hidden layer, patch tokens only, LayerNorm without
affine (RAE, section 3).
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModel, LlavaForConditionalGeneration

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
    """Frozen tower with its pixel normalisation. `layer` indexes hidden states: -2, the penultimate, is
    LLaVA-1.5's choice.
    """

    def __init__(self, tower: CLIPVisionModel, layer: int, mean: list[float], std: list[float], digest: str):
        super().__init__()
        config = tower.config
        if not -config.num_hidden_layers <= layer <= -1:
            raise ValueError(
                f"layer {layer}: the tower has {config.num_hidden_layers} layers; use -1 to "
                f"{-config.num_hidden_layers}"
            )
        self.tower = tower.eval().requires_grad_(False)
        self.layer = layer
        self.digest = digest
        self.image_size: int = config.image_size
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.feature_dim: int = config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, layer: int = -2, dtype: torch.dtype = torch.float32
    ) -> "RepresentationEncoder":
        """Loads a CLIP vision folder, or the tower of a LLaVA folder. Pixel mean and std come from
        `preprocessor_config.json`.

        Raises:
            ValueError: where the folder is missing or holds another architecture.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"encoder folder {folder}: no config.json; expected a folder written by save_pretrained"
            )
        config = AutoConfig.from_pretrained(folder)
        match config.model_type:
            case "llava":
                tower = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).model.vision_tower
            case "clip_vision_model" | "clip":
                tower = CLIPVisionModel.from_pretrained(folder, dtype=dtype)
            case other:
                raise ValueError(
                    f"encoder folder {folder}: model_type {other!r}; expected 'clip_vision_model', 'clip' "
                    "or 'llava'"
                )
        mean, std = list(CLIP_MEAN), list(CLIP_STD)
        preprocessor = folder / "preprocessor_config.json"
        if preprocessor.is_file():
            fields = json.loads(preprocessor.read_text())
            mean, std = fields.get("image_mean", mean), fields.get("image_std", std)
        return cls(tower, layer, mean, std, weights_digest(folder))

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Features float32, zero mean and unit variance over each token's channels.

        Raises:
            ValueError: for another image size than the tower's, or values outside [0, 1].
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
        normalised = ((pixels - self.mean) / self.std).to(self.tower.dtype)
        with torch.no_grad():
            hidden = self.tower(pixel_values=normalised, output_hidden_states=True).hidden_states[self.layer]
        return F.layer_norm(hidden[:, 1:].float(), (self.feature_dim,))
