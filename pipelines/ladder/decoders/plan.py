"""Which decoders are compared: rows that differ in what they are trained by, each of several seeds."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from repfusion.config import Config, weights_of
from repfusion.data.columns import manifest_digest, shard_names
from repfusion.decoding.config import (
    AdversarialConfig,
    DecoderRecipe,
    DecoderTrainingConfig,
    DrawingConfig,
    PerceptualConfig,
)
from repfusion.files import digest_of, weights_digest
from repfusion.foundation.config import LengthConfig
from repfusion.latents.load import EncoderConfig
from repfusion.scenes.world import WorldConfig

Row = Literal["l1", "perceptual", "gan", "drawing"]
ROWS: tuple[Row, ...] = get_args(Row)
TITLES: dict[Row, str] = {
    "l1": "L1",
    "perceptual": "L1 + perceptual",
    "gan": "L1 + perceptual + GAN",
    "drawing": "diffusion decoder",
}

NOT_SHARED = ("seed", "device", "compile", "micro_batch_size", "save_every_sec", "measure_every_steps")
NOT_SHARED += ("tracking", "method", "perceptual", "adversarial")
"""Fields of a recipe that are a row's own, or change rounding at most."""


class DecoderPlan(Config):
    """A comparison of decoders of one encoder."""

    images: Path
    """Folder of image shards of scenes to train on, such as ROOT/curate of a workflow of scenes."""
    out: Path
    """Folder to write: `results.jsonl`, a line a training; `comparison.md`, made from it; the decoders."""
    encoder: EncoderConfig = EncoderConfig()
    """The encoder whose features are decoded."""
    judge: EncoderConfig = EncoderConfig()
    """The encoder in whose features, averaged over tokens, Frechet distances are taken."""
    world: WorldConfig = WorldConfig()
    """What the scenes to measure on are drawn from; their size is the encoder's."""
    num_scenes: int = Field(default=600, ge=2)
    """Scenes to measure on: drawn anew, in no training."""
    rows: tuple[Row, ...] = Field(default=ROWS, min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**62)], ...] = Field(default=(0, 1, 2), min_length=1)
    """What first weights, images and noise follow from; each is a training."""
    recipe: DecoderRecipe = DecoderRecipe(
        hidden_size=192, depth=3, num_heads=4, length=LengthConfig(num_steps=6000, batch_size=64, lr=4e-4)
    )
    """What all rows share. What rows differ in, it may not hold."""
    lpips: Path | None = None
    """Folder of LPIPS, for rows `perceptual` and `gan`; where it is given, every row is measured by it."""
    dino: Path | None = None
    """Folder of a DINO, for row `gan`."""
    drawing: DrawingConfig = DrawingConfig()
    """The row `drawing`: patches and steps, or the VAE in whose latents it draws."""

    @model_validator(mode="after")
    def _shares_what_is_shared(self) -> "DecoderPlan":
        recipe = self.recipe
        for name, is_own in (
            ("perceptual", recipe.perceptual is not None),
            ("adversarial", recipe.adversarial is not None),
            ("method", recipe.method.kind != "rae"),
            ("init_from", recipe.init_from is not None),
        ):
            if is_own:
                raise ValueError(f"recipe.{name} is given, in which the rows differ; leave it out")
        return self

    def lacks(self, row: Row) -> str | None:
        """Why a row cannot be trained: what it is judged by is not given."""
        needs = {"lpips": self.lpips} if row in ("perceptual", "gan") else {}
        needs |= {"dino": self.dino} if row == "gan" else {}
        missing = [name for name, folder in needs.items() if folder is None]
        return f"{' and '.join(missing)} not given" if missing else None

    def recipe_of(self, row: Row) -> DecoderRecipe:
        """What a row that lacks nothing is trained by. The discriminator is trained from 6/16 of the steps on
        and followed from 8/16 on, as in RAE.
        """
        num_steps = self.recipe.length.num_steps
        changes: dict[str, Any] = {"method": self.drawing} if row == "drawing" else {}
        if self.lpips is not None:
            weight = 1.0 if row in ("perceptual", "gan") else 0.0
            changes["perceptual"] = PerceptualConfig(path=self.lpips, weight=weight)
        if row == "gan" and self.dino is not None:
            first, followed = num_steps * 6 // 16, num_steps * 8 // 16
            changes["adversarial"] = AdversarialConfig(
                path=self.dino, discriminator_from_step=first, gan_from_step=followed
            )
        shared = {name: getattr(self.recipe, name) for name in DecoderRecipe.model_fields}
        return DecoderRecipe(**{**shared, **changes})

    def training(self, row: Row, seed: int) -> DecoderTrainingConfig:
        """The training of a row that lacks nothing. Its folder is of this budget and model alone: the state
        of another is never taken for it.
        """
        recipe = self.recipe_of(row)
        shared = {name: getattr(recipe, name) for name in DecoderRecipe.model_fields}
        name = f"{row}-{seed}-{digest_of([self.budget(), self.model(row)])[:8]}"
        out = self.out / "decoders" / name
        return DecoderTrainingConfig(
            **{**shared, "seed": seed}, images=self.images, out=out, encoder=self.encoder
        )

    def budget(self) -> str:
        """Digest of what all rows share: recipe, encoders by their weights, images and scenes."""
        recipe = self.recipe.model_dump(mode="json", exclude=set(NOT_SHARED))
        encoders = [
            {**one.model_dump(mode="json", exclude={"path"}), "weights": weights_digest(one.path)}
            for one in (self.encoder, self.judge)
        ]
        shards = {name: (self.images / name).stat().st_size for name in shard_names(self.images)}
        images = manifest_digest(self.images) or digest_of(shards)
        return digest_of([recipe, encoders, images, self.world.model_dump(mode="json"), self.num_scenes])

    def model(self, row: Row) -> str:
        """Digest of what is a row's own: its losses, and the weights that judge or are drawn in."""
        recipe = self.recipe_of(row)
        paths: Any = {"method": {"vae"}, "perceptual": {"path"}, "adversarial": {"path"}}
        own = recipe.model_dump(mode="json", include={"method", "perceptual", "adversarial"}, exclude=paths)
        weights = {name: weights_digest(folder) for name, folder in weights_of(recipe).items()}
        return digest_of([own, weights])
