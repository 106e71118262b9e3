"""A small folder of images, and trainings on it with and without the networks that judge what is rebuilt."""

from pathlib import Path

import numpy as np
import pytest
from tiny_critics import write_dino, write_lpips
from tiny_shards import write_shards

from repfusion.decoding.config import AdversarialConfig, DecoderTrainingConfig, PerceptualConfig
from repfusion.foundation.config import LengthConfig
from repfusion.latents.load import EncoderConfig


def plain(index: int) -> np.ndarray:
    """An image of one colour, of no encoder's shape."""
    colour = np.random.default_rng(index).integers(0, 256, 3, np.uint8)
    return np.broadcast_to(colour, (20, 26, 3)).copy()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("own") / "curate", [plain(i) for i in range(40)], 2)


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lpips(tmp_path_factory.mktemp("lpips") / "lpips")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("dino") / "dino")


@pytest.fixture
def config(images: Path, foundation: Path, tmp_path: Path) -> DecoderTrainingConfig:
    """L1 alone."""
    return DecoderTrainingConfig(
        images=images,
        out=tmp_path / "decoder",
        encoder=EncoderConfig(path=foundation / "vision_tower"),
        hidden_size=16,
        depth=1,
        num_heads=2,
        held_out_share=0.25,
        length=LengthConfig(num_steps=120, batch_size=8, lr=1e-2),
        dtype="float32",
    )


@pytest.fixture
def full(config: DecoderTrainingConfig, lpips_folder: Path, dino: Path) -> DecoderTrainingConfig:
    """All losses and averages, over four steps in which each of them begins at another."""
    adversarial = AdversarialConfig(path=dino, discriminator_from_step=1, gan_from_step=2)
    return config.model_copy(
        update={
            "length": LengthConfig(num_steps=4, batch_size=4, lr=1e-3),
            "ema_decay": 0.5,
            "final_lr_ratio": 0.1,
            "perceptual": PerceptualConfig(path=lpips_folder),
            "adversarial": adversarial,
        }
    )
