"""Pixels -> logits of being real: trained heads on the features of a frozen DINO (StyleGAN-T, arXiv
2301.09515; RAE, arXiv 2510.11690), and the hinge losses of both sides.

A head is two convolutions on the grid of patches and one to a logit for each patch, all with spectral norm.
Ours are the norm within an image, where StyleGAN-T has that of a batch, and the 3 x 3 patches, where it has
9 in a row: so no image's logits depend on the others of its batch.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from repfusion.latents.tower import IMAGENET
from repfusion.pretrained.config import read_config
from repfusion.pretrained.weights import load_transformers

WHAT = "discriminator"
BLOCKS = (2, 5, 8, 11)
"""Blocks of the DINO, counted from 0, whose outputs have a head each."""
BESIDE = r"classifier\.|embeddings\.mask_token$"
"""Names of weights that may lie beside the tower's."""
POOLER = r"pooler\."
"""Names of a ViT's weights that a DINO does not have."""
SLOPE = 0.2
"""Slope of the leaky ReLUs below zero."""
GROUPS = 8
"""Groups of channels that are normalised together."""


class Head(nn.Module):
    """The logits of one block's features. `width` is a multiple of 8."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = spectral_norm(nn.Conv2d(width, width, 1))
        self.mix_norm = nn.GroupNorm(GROUPS, width)
        self.look = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.look_norm = nn.GroupNorm(GROUPS, width)
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, grid: Float[Tensor, "b d r c"]) -> Float[Tensor, "b 1 r c"]:
        x = F.leaky_relu(self.mix_norm(self.mix(grid)), SLOPE)
        x = x + F.leaky_relu(self.look_norm(self.look(x)), SLOPE)
        return self.out(x)


class Discriminator(nn.Module):
    """Trained heads on a frozen DINO.

    Args:
        tower: a ViTModel or a Dinov2Model, which is frozen.
        image_size: side in px that images are brought to, a multiple of the tower's patches.
    """

    def __init__(self, tower: nn.Module, image_size: int):
        super().__init__()
        self.tower, self.image_size = tower.eval().requires_grad_(False), image_size
        config: Any = tower.config
        self.rows = image_size // config.patch_size
        # a ViT takes other sizes than its own where it is told so, a Dinov2 takes every size
        self.options = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}
        self.heads = nn.ModuleList(Head(config.hidden_size) for _ in BLOCKS)
        self.register_buffer("mean", torch.tensor(IMAGENET[0]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET[1]).view(1, 3, 1, 1), persistent=False)
        self.heads.eval()

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """The logits of every patch and head, high for what looks real; pixels are about [0, 1]."""
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        normalised = (pixels - self.mean) / self.std
        states = self.tower(pixel_values=normalised, output_hidden_states=True, **self.options).hidden_states
        logits = []
        for block, head in zip(BLOCKS, self.heads, strict=True):
            patches = states[block + 1][:, 1:]
            grid = patches.mT.unflatten(-1, (self.rows, self.rows))
            logits.append(head(grid.contiguous()).flatten(1))
        return torch.cat(logits, dim=1).float()

    def refresh(self) -> None:
        """One step of the power iteration that estimates each weight's largest singular value (spectral
        normalisation, arXiv 1802.05957, algorithm 1). Passes leave the estimates as they are, or a step of
        two passes would be another than a step of one.
        """
        for layer in self.heads.modules():
            if isinstance(layer, nn.Conv2d):
                layer.train()
                _ = layer.weight
                layer.eval()


def load_discriminator(folder: Path, image_size: int | None, seed: int) -> Discriminator:
    """Fresh heads, which follow from the seed, on the DINO of a folder.

    Args:
        folder: of a ViTModel or a Dinov2Model, as save_pretrained writes it, such as DINO's S/8 and S/16.
        image_size: side in px that images are brought to; None is the tower's own.
        seed: decides the heads' first weights.

    Raises:
        ValueError: the folder holds another architecture, fewer than 12 blocks, or weights that do not fit;
            or the size is no multiple of the patches.
    """
    import transformers

    kind = read_config(folder, WHAT).get("model_type")
    if kind not in ("vit", "dinov2"):
        raise ValueError(
            f"{WHAT} folder {folder}: config.json says model_type {kind!r}; expected a DINO: vit or dinov2"
        )
    model_class = transformers.ViTModel if kind == "vit" else transformers.Dinov2Model
    with torch.random.fork_rng(devices=[]):
        tower = load_transformers(model_class, folder, WHAT, beside=BESIDE, unused=POOLER)
    tower.pooler = None  # transformers' own, which DINO has none of
    depth, width, patch = (
        tower.config.num_hidden_layers,
        tower.config.hidden_size,
        tower.config.patch_size,
    )
    if depth <= BLOCKS[-1] or width % GROUPS:
        raise ValueError(
            f"{WHAT} folder {folder}: {depth} blocks of width {width}; expected at least {BLOCKS[-1] + 1}, "
            f"whose outputs {', '.join(map(str, BLOCKS))} are read, and a multiple of {GROUPS}"
        )
    size = tower.config.image_size if image_size is None else image_size
    if size % patch:
        raise ValueError(
            f"{WHAT} folder {folder}: images of {size} px are no multiple of its patches of {patch}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(tower, size)


def discriminator_loss(real: Float[Tensor, "b k"], rebuilt: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Half the hinge loss of logits of real and of rebuilt images (arXiv 1705.02894, with VQGAN's factor 1/2,
    arXiv 2012.09841).
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + rebuilt).mean())


def generator_loss(rebuilt: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Minus the mean logit of rebuilt images: the other side of the hinge loss."""
    return -rebuilt.mean()
