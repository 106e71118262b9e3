"""What a decoder is trained on, how large it is and how long it takes."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from repfusion.config import Config, WeightsFolder
from repfusion.diffusion.sampler import Solver
from repfusion.foundation.config import LengthConfig
from repfusion.latents.load import EncoderConfig
from repfusion.tracking import TrackingConfig


class PerceptualConfig(Config):
    """A distance of images by LPIPS (arXiv 1801.03924)."""

    path: WeightsFolder
    """Folder of a VGG-16 and LPIPS's heads, as repfusion/decoding/perceptual.py says."""
    weight: float = Field(default=1.0, ge=0)
    """Weight beside the pixels' L1. 0 measures it and does not train on it."""


class AdversarialConfig(Config):
    """A discriminator on a frozen DINO (RAE, arXiv 2510.11690, section 3)."""

    path: WeightsFolder
    """Folder of DINO's ViT-S/8 or S/16, or another ViTModel or Dinov2Model of at least 12 blocks."""
    discriminator_from_step: int = Field(ge=0)
    """Completed steps after which the discriminator is trained: 6/16 of all in RAE."""
    gan_from_step: int = Field(ge=0)
    """Completed steps after which the decoder is trained against it: 8/16 of all in RAE."""
    weight: float = Field(default=0.75, ge=0)
    """Weight beside the adaptive one, which makes its gradient at the decoder's last layer as long as that of
    the other losses.
    """
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate of the heads, on the decoder's schedule over the steps that they are trained."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in px of the images that the DINO sees, a multiple of its patches; None is its own."""

    @model_validator(mode="after")
    def _trained_before_used(self) -> "AdversarialConfig":
        if self.gan_from_step < self.discriminator_from_step:
            raise ValueError(
                f"gan_from_step is {self.gan_from_step}, discriminator_from_step is "
                f"{self.discriminator_from_step}: the decoder would follow an untrained discriminator"
            )
        return self


class RAEMethodConfig(Config):
    """A RAE decoder: one pass from features to pixels, trained to come near them."""

    kind: Literal["rae"] = "rae"


class DrawingConfig(Config):
    """A decoder that draws: a small DiT whose flow ends at pixels or at a VAE's latents
    (latents/drawing_decoder.py), trained by the squared error of its velocity.
    """

    kind: Literal["drawing"] = "drawing"
    patch_size: int = Field(default=4, ge=1)
    """Side of the square that a token of the DiT stands for: in px, or in latent pixels of the VAE. Half of
    it is four times the tokens.
    """
    vae: WeightsFolder | None = None
    """Folder of a VAE of diffusers in whose latents it draws, for images of the encoder's size; None draws
    pixels. The decoder's folder then holds the VAE's decoder too.
    """
    shift: float = Field(default=1.0, gt=0)
    """Shift of the noise levels, in training as in sampling; 1 leaves them evenly spread, more raises
    them.
    """
    num_steps: int = Field(default=8, ge=1)
    """Steps from noise to image that whoever decodes takes."""
    solver: Solver = "euler"
    """The method of these steps."""


DecoderMethod = Annotated[RAEMethodConfig | DrawingConfig, Field(discriminator="kind")]


class RebuildingRecipe(Config):
    """How a network that rebuilds images is trained: a decoder, or a tokenizer."""

    init_from: Path | None = None
    """Folder of one of the same sizes to go on from; None starts from scratch."""
    length: LengthConfig = LengthConfig(num_steps=50_000, batch_size=64, lr=4e-4)
    """Steps, images a step and peak learning rate."""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final over peak learning rate; 0.1 in RAE."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """How much of the averaged weights stays at a step, once so many steps are done that an average is worth
    it: 0.9978 in RAE. The averages are what is measured and written; None writes the weights themselves.
    """
    perceptual: PerceptualConfig | None = None
    """LPIPS beside the pixels' L1; None does without, and measures none."""
    adversarial: AdversarialConfig | None = None
    """The adversarial loss; None does without."""
    held_out_share: float = Field(default=0.05, ge=0, le=0.5)
    """What share of the images is left for measuring, by the same hash as that of trainings."""
    num_measured: int = Field(default=256, ge=1)
    """At most so many of them are measured."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images of one pass of one rank; accumulation makes up the rest of `length.batch_size`. None takes a
    rank's share at once. Changes rounding alone.
    """
    measure_every_steps: int | None = Field(default=None, ge=1)
    """Steps after which what is held out is measured, and some of it drawn, before the end too; None measures
    at the end alone.
    """
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the first weights, and each step's images and noise."""
    device: str = "cpu"
    """Where it is trained: `cpu` or `cuda`, of which each rank takes its own."""
    dtype: Literal["float32", "float16"] = "float16"
    """Precision in which the weights are written."""
    compile: bool = False
    """Whether the loss and its gradients are compiled."""
    save_every_sec: float = Field(default=120.0, gt=0)
    """How often the state is written."""
    tracking: TrackingConfig = TrackingConfig()
    """Where losses, measures and pictures are logged."""


class DecoderRecipe(RebuildingRecipe):
    """How a decoder is trained, whatever it is trained on."""

    method: DecoderMethod = RAEMethodConfig()
    """Whether the decoder rebuilds in one pass (`kind: rae`) or draws in several (`kind: drawing`)."""
    hidden_size: int = Field(default=768, ge=4)
    """Width."""
    depth: int = Field(default=12, ge=1)
    """Blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads."""
    feature_noise: float = Field(default=0.5, ge=0)
    """Largest standard deviation of the noise on features, which have unit variance: what is sampled is never
    exact (RAE, arXiv 2510.11690, section 4).
    """

    @model_validator(mode="after")
    def _judged_where_it_rebuilds(self) -> "DecoderRecipe":
        if self.method.kind != "drawing":
            return self
        if self.adversarial is not None or (self.perceptual is not None and self.perceptual.weight):
            raise ValueError(
                "method.kind drawing is trained on velocities, and no step of it has an image to judge: "
                "leave out adversarial, and perceptual or its weight (of weight 0 LPIPS is measured alone)"
            )
        return self


class RebuildingConfig(RebuildingRecipe):
    """What such a network is trained on, and where it goes."""

    images: Path
    """Folder of image shards, such as ROOT/curate of a workflow."""
    out: Path
    """Folder to write, which models name. Beside it, as OUT.state, lies the state from which a training that
    was cut off goes on.
    """
    encoder: EncoderConfig
    """The frozen tower whose features are decoded, or have the semantic codes."""


class DecoderTrainingConfig(DecoderRecipe, RebuildingConfig):
    """A decoder's training; `out` is `model.decoder` of the trainings on its encoder."""
