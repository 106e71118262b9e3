"""The sizes and the lengths of the small foundation's trainings."""

from pydantic import Field

from repfusion.config import Config
from repfusion.scenes.world import WorldConfig


class LengthConfig(Config):
    """How long one part is trained."""

    num_steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Scenes a step."""
    lr: float = Field(default=8e-4, gt=0)
    """Peak learning rate; it rises over the first steps and falls to zero by a cosine."""


class FoundationConfig(Config):
    device: str = "cpu"
    """Where everything is trained: `cpu` or `cuda`."""
    compile: bool = False
    """Whether losses and their gradients are compiled: faster after a minute a part; needs a C++ compiler."""
    num_scenes: int = Field(default=30_000, ge=1)
    """Distinct training scenes."""
    relation_share: float = Field(default=0.6, ge=0, le=1)
    """Share of the scenes whose two things stand in a relation."""
    texts_per_scene: int = Field(default=8, ge=1)
    """Dialogues of either course, and captions, written about each scene."""
    image_size: int = Field(default=64, ge=1)
    """Pixels a side."""
    patch_size: int = Field(default=16, ge=1)
    """Pixels a side of a patch: (image_size / patch_size)^2 tokens."""
    vision_width: int = Field(default=96, ge=1)
    """Width of the tower, so of the latents."""
    vision_layers: int = Field(default=5, ge=1)
    """Layers of the tower; the last one only serves the standard CLIP geometry, features are the penultimate
    state.
    """
    vision_heads: int = Field(default=3, ge=1)
    """Attention heads of the tower."""
    text_width: int = Field(default=192, ge=1)
    """Width of the language model."""
    text_layers: int = Field(default=4, ge=1)
    """Layers of the language model."""
    text_heads: int = Field(default=3, ge=1)
    """Attention heads of the language model."""
    decoder_width: int = Field(default=192, ge=1)
    """Width of the RAE decoder."""
    decoder_depth: int = Field(default=3, ge=1)
    """Blocks of the RAE decoder."""
    decoder_heads: int = Field(default=3, ge=1)
    """Attention heads of the RAE decoder."""
    feature_noise: float = Field(default=0.5, ge=0)
    """Largest standard deviation of the noise on features under which pixels are rebuilt (features have unit
    variance).
    """
    pixel_weight: float = Field(default=20.0, ge=0)
    """Weight of the rebuilt pixels' L1 beside the answers' loss."""
    perception: LengthConfig = LengthConfig(num_steps=12_000, batch_size=64)
    """Tower, LLaVA and decoder together."""
    judgement: LengthConfig = LengthConfig(num_steps=10_000, batch_size=64, lr=6e-4)
    """The LLaVA going on over the frozen tower with dialogues most of which are claims."""
    polish: LengthConfig = LengthConfig(num_steps=3_000, batch_size=64, lr=5e-4)
    """The decoder alone, on the tower as it then is."""
    noise_taught: LengthConfig = LengthConfig(num_steps=4_000, batch_size=64, lr=3e-4)
    """The LLaVA going on over the frozen tower, its projector reading noisy latents of all levels."""
    base_dim: int = Field(default=64, ge=1)
    """Base dimension of those levels' shift, as in the base's `flow`."""
    language: LengthConfig = LengthConfig(num_steps=8_000, batch_size=96)
    """The language-only twin."""
    large_width: int = Field(default=256, ge=1)
    """Width of the larger LLaVA's language model."""
    large_layers: int = Field(default=6, ge=1)
    """Layers of the larger LLaVA's language model."""
    large_heads: int = Field(default=4, ge=1)
    """Attention heads of the larger LLaVA, as wide as the small one's."""
    large: LengthConfig = LengthConfig(num_steps=2_500, batch_size=64, lr=3e-4)
    """The larger LLaVA, from the small one's weights grown to its size."""
    vae_channels: int = Field(default=16, ge=1)
    """Channels of the VAE's latents; its grid is the tower's."""
    vae: LengthConfig = LengthConfig(num_steps=3_000, batch_size=48, lr=1e-3)
    """The VAE from scratch."""
    vae_noise: float = Field(default=0.3, ge=0)
    """Largest noise on the VAE's latents while it is trained, in their standard deviations."""
    save_every_sec: float = Field(default=120.0, gt=0)
    """How often a part that is being trained writes its state, from which it goes on."""

    @property
    def world(self) -> WorldConfig:
        """What the training scenes are drawn from."""
        return WorldConfig(image_size=self.image_size, relation_share=self.relation_share)

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side
