"""Folders of the frozen networks that judge a decoder's images: a VGG-16 with LPIPS's heads, and tiny DINOs
of the real classes, all of random weights.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from repfusion.decoding.perceptual import LPIPS

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
    "image_size": 32,
}


def write_lpips(folder: Path) -> Path:
    """A folder of LPIPS, whose heads are positive as the published ones are, in float16 to take less."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = LPIPS()
        for layer in network.features.values():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    weights = {name: p.abs() if name.startswith("lin") else p for name, p in network.state_dict().items()}
    save_file({name: p.half().contiguous() for name, p in weights.items()}, folder / "model.safetensors")
    return folder


def write_dino(folder: Path, kind: str = "vit", **changes: Any) -> Path:
    """A folder of a DINO, a ViT or a Dinov2."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        if kind == "vit":
            tower: Any = ViTModel(ViTConfig(**{**SIZES, **changes}), add_pooling_layer=False)
        else:
            fields = {**SIZES, **changes}
            ratio = fields.pop("intermediate_size") // fields["hidden_size"]
            tower = Dinov2Model(Dinov2Config(**fields, mlp_ratio=ratio))
        for p in tower.parameters():
            # as drawn, random blocks would hardly change what they are given
            if p.ndim == 2:
                p.data.mul_(8)
    tower.save_pretrained(folder)
    return folder
