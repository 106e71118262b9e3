"""The stage `decoder`: curated images -> the decoder of an encoder, `stage:decoder` to trainings.

ROOT/decoder/model/         the decoder, what was measured of it and a picture
ROOT/decoder/model.state    where a training that was cut off goes on; set aside with it when it is stale
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.shards.digests import Digests, flatten
from pipelines.shards.manifest import Upstream
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from repfusion.config import naming, weights_of
from repfusion.decoding.config import DecoderRecipe, DecoderTrainingConfig, RebuildingRecipe
from repfusion.files import file_sha256
from repfusion.latents.load import EncoderConfig

DECODER = "decoder"
"""Name of the stage, of its folder and of its section."""
NOT_BYTES = (
    "device",
    "compile",
    "micro_batch_size",
    "save_every_sec",
    "measure_every_steps",
    "tracking",
)
"""Fields that change the weights by rounding at most."""


class DecoderStageConfig(DecoderRecipe):
    """The decoder that a workflow trains on its own images, in the process that runs the workflow."""

    encoder: EncoderConfig | None = None
    """The frozen tower whose features are decoded; None takes that of the trainings whose model.decoder is
    `stage:decoder`.
    """


def model_folder(root: Path, name: str) -> Path:
    """Where a stage of this kind leaves its network, by the workflow's root."""
    return root / name / "model"


def decoder_folder(root: Path) -> Path:
    """Where the stage leaves the decoder of a workflow, by its root."""
    return model_folder(root, DECODER)


@dataclass(frozen=True)
class Rebuilding:
    """A network that a workflow trains on its own images, under the name of its stage and section."""

    name: str
    recipe: RebuildingRecipe
    encoder: EncoderConfig
    key: str
    """Where the configuration says what the encoder is."""

    def fields(self, digest: str, digests: Digests) -> dict[str, Any]:
        """What decides the network: its section, the encoder's folder (by its digest) and those of the
        networks that judge it. Raises ValueError, naming the config key, where one is missing.
        """
        prefix, config = f"{self.name}.", self.recipe
        fields = flatten(config.model_dump(mode="json", exclude={*NOT_BYTES, "encoder"}), prefix)
        fields |= flatten(self.encoder.model_dump(mode="json"), f"{prefix}encoder.")
        fields[f"{prefix}encoder.path"] = digest
        folders = weights_of(config.model_copy(update={"encoder": None}), prefix)
        if config.init_from is not None:
            folders[f"{prefix}init_from"] = config.init_from
        return fields | {key: digests.folder(folder, key) for key, folder in folders.items()}

    def check(self) -> None:
        """Raises ValueError, naming the config key, where the encoder or a judge is none."""
        from repfusion.decoding.discriminator import load_discriminator
        from repfusion.decoding.perceptual import LPIPS

        config = self.recipe
        with naming(f"{self.key}.path"):
            self.encoder.load(on_meta=True)
        if config.perceptual is not None:
            with naming(f"{self.name}.perceptual.path"):
                LPIPS.from_pretrained(config.perceptual.path)
        if config.adversarial is not None:
            with naming(f"{self.name}.adversarial.path"):
                load_discriminator(config.adversarial.path, config.adversarial.image_size, config.seed)

    def stage(
        self,
        images: Stage,
        place: Place,
        train: Callable[[Path, Path], dict[str, Any]],
        check: Callable[[], object],
    ) -> WholeStage:
        """The stage: `train` is given the folder of images and the one to write. Raises ValueError where a
        folder is missing.
        """
        out = model_folder(place.root, self.name)
        source = place.columns / images.name

        def execute(above: Upstream) -> dict[str, Any]:
            if not place.data.is_local:
                mirror(images.folder, source)
            measured = train(source, out)
            return {"measured": measured, "sha256": file_sha256(out / "model.safetensors")}

        digest = place.digests.folder(self.encoder.path, f"{self.key}.path")
        fields = self.fields(digest, place.digests)
        outputs = (out / "model.safetensors", out / "measured.json")
        folder = Folder(str(place.root / self.name))
        return WholeStage(
            self.name, fields, folder, (images,), execute, outputs, needs_ray=False, check=check
        )


def decoder_stage(
    config: DecoderStageConfig, encoder: EncoderConfig, key: str, images: Stage, place: Place
) -> WholeStage:
    """The stage of a workflow's decoder. `key` is where the configuration says what the encoder is. Raises
    ValueError where a folder is missing.
    """
    given = {name: getattr(config, name) for name in DecoderRecipe.model_fields}
    made = Rebuilding(DECODER, config, encoder, key)

    def train(source: Path, out: Path) -> dict[str, Any]:
        from repfusion.decoding.train import train_decoder

        return train_decoder(DecoderTrainingConfig(**given, images=source, out=out, encoder=encoder))

    def check() -> None:
        made.check()
        if config.method.kind == "drawing":
            from repfusion.decoding.making import drawing_sizes, load_painter

            seen = encoder.load(on_meta=True)
            with naming(f"{DECODER}.method"):
                drawing_sizes(config, config.method, seen)
                load_painter(config.method, seen.image_size)

    return made.stage(images, place, train, check)
