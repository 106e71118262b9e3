"""What a decoder is trained on, how large it is and how long it takes."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from repfusion.config import Config
from repfusion.foundation.config import LengthConfig
from repfusion.latents.load import EncoderConfig


class DecoderTrainingConfig(Config):
    images: Path
    """Folder of image shards, such as ROOT/curate of a workflow."""
    out: Path
    """Folder to write: `model.decoder` of the trainings on this encoder. Beside it, as OUT.state, lies the
    state from which a training that was cut off goes on.
    """
    encoder: EncoderConfig
    """The frozen tower whose features are decoded."""
    init_from: Path | None = None
    """Folder of a decoder of the same sizes to go on from; None starts from scratch."""
    hidden_size: int = Field(default=768, ge=4)
    """Width."""
    depth: int = Field(default=12, ge=1)
    """Blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads."""
    length: LengthConfig = LengthConfig(num_steps=50_000, batch_size=64, lr=4e-4)
    """Steps, images a step and peak learning rate."""
    feature_noise: float = Field(default=0.5, ge=0)
    """Largest standard deviation of the noise on features, which have unit variance: what is sampled is never
    exact (RAE, arXiv 2510.11690, section 4).
    """
    held_out_share: float = Field(default=0.05, ge=0, le=0.5)
    """What share of the images is left for measuring, by the same hash as that of trainings."""
    num_measured: int = Field(default=256, ge=1)
    """At most so many of them are measured."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the first weights, and each step's images and noise."""
    device: str = "cpu"
    """Where it is trained: `cpu` or `cuda`."""
    dtype: Literal["float32", "float16"] = "float16"
    """Precision in which the weights are written."""
    compile: bool = False
    """Whether the loss and its gradients are compiled."""
    save_every_sec: float = Field(default=120.0, gt=0)
    """How often the state is written."""
