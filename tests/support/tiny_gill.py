"""Checkpoints of a tiny GILL, and image shards that it indexes."""

from pathlib import Path

import numpy as np
import torch
from tiny_shards import write_shards

from repfusion.conditioning.related.gill import GillConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import save_checkpoint
from repfusion.weights import WEIGHTS


def make_gill(parts: Path, statistics: LatentStatistics, dit_width: int = 24, **changes) -> TextToImage:
    """Over the language model, tower and decoder in the folder `parts`, with the shipped text encoder. What
    it draws depends on its condition: a fresh DiT says nothing.
    """
    torch.manual_seed(0)
    sizes = {"num_queries": 24, "num_image_tokens": 3, "width": 16, "depth": 1, "retrieval_width": 8}
    config = ModelConfig.model_validate(
        {
            "conditioning": GillConfig(second=WEIGHTS / "language", **{**sizes, **changes}),
            "mllm": parts / "llava",
            "encoder": {"path": parts / "vision_tower"},
            "decoder": parts / "decoder",
            "dit": DiTConfig(hidden_size=dit_width, depth=1, num_heads=2),
        }
    )
    model = build_model(config, statistics).eval()
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_gill(folder: Path, model: TextToImage) -> Path:
    """A checkpoint of the model's own weights."""
    checkpoint = folder / "step_00000001"
    save_checkpoint(checkpoint, model, model.trainable_state(), step=1)
    return checkpoint


def noise_images(num: int, side: int = 32) -> list[np.ndarray]:
    """Images of random pixels."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(num)]


def write_noise(folder: Path, num: int = 7, num_shards: int = 2) -> Path:
    """Shards of `noise_images`, in turn to the shards."""
    return write_shards(folder, noise_images(num), num_shards)
