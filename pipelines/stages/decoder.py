"""The stage `decoder`: curated images -> the decoder of an encoder, `stage:decoder` to trainings.

ROOT/decoder/model/         the decoder, what was measured of it and a picture
ROOT/decoder/model.state    where a training that was cut off goes on; set aside with it when it is stale
"""

from pathlib import Path
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.shards.digests import Digests, flatten
from pipelines.shards.manifest import Upstream
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from repfusion.config import naming, weights_of
from repfusion.decoding.config import DecoderRecipe, DecoderTrainingConfig
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
"""Fields that change a decoder's weights by rounding at most."""


class DecoderStageConfig(DecoderRecipe):
    """The decoder that a workflow trains on its own images, in the process that runs the workflow."""

    encoder: EncoderConfig | None = None
    """The frozen tower whose features are decoded; None takes that of the trainings whose model.decoder is
    `stage:decoder`.
    """


def decoder_folder(root: Path) -> Path:
    """Where the stage leaves the decoder of a workflow, by its root."""
    return root / DECODER / "model"


def fingerprint_fields(
    config: DecoderStageConfig, encoder: EncoderConfig, digest: str, digests: Digests
) -> dict[str, Any]:
    """What decides the decoder: its section, the encoder's folder (by its digest) and those of the networks
    that judge it. Raises ValueError, naming the config key, where one is missing.
    """
    values = config.model_dump(mode="json", exclude={*NOT_BYTES, "encoder"})
    fields = flatten(values, f"{DECODER}.")
    fields |= flatten(encoder.model_dump(mode="json"), f"{DECODER}.encoder.")
    fields[f"{DECODER}.encoder.path"] = digest
    folders = weights_of(config.model_copy(update={"encoder": None}), f"{DECODER}.")
    if config.init_from is not None:
        folders[f"{DECODER}.init_from"] = config.init_from
    return fields | {key: digests.folder(folder, key) for key, folder in folders.items()}


def decoder_stage(
    config: DecoderStageConfig, encoder: EncoderConfig, key: str, images: Stage, place: Place
) -> WholeStage:
    """The stage of a workflow's decoder. `key` is where the configuration says what the encoder is. Raises
    ValueError where a folder is missing.
    """
    out = decoder_folder(place.root)
    source = place.columns / images.name
    given = {name: getattr(config, name) for name in DecoderRecipe.model_fields}
    training = DecoderTrainingConfig(**given, images=source, out=out, encoder=encoder)

    def execute(above: Upstream) -> dict[str, Any]:
        from repfusion.decoding.train import train_decoder

        if not place.data.is_local:
            mirror(images.folder, source)
        measured = train_decoder(training)
        return {"measured": measured, "sha256": file_sha256(out / "model.safetensors")}

    def check() -> None:
        from repfusion.decoding.discriminator import load_discriminator
        from repfusion.decoding.making import drawing_sizes, load_painter
        from repfusion.decoding.perceptual import LPIPS

        with naming(f"{key}.path"):
            seen = encoder.load(on_meta=True)
        if config.method.kind == "drawing":
            with naming(f"{DECODER}.method"):
                drawing_sizes(config, config.method, seen)
                load_painter(config.method, seen.image_size)
        if config.perceptual is not None:
            with naming(f"{DECODER}.perceptual.path"):
                LPIPS.from_pretrained(config.perceptual.path)
        if config.adversarial is not None:
            with naming(f"{DECODER}.adversarial.path"):
                load_discriminator(config.adversarial.path, config.adversarial.image_size, config.seed)

    digest = place.digests.folder(encoder.path, f"{key}.path")
    fields = fingerprint_fields(config, encoder, digest, place.digests)
    outputs = (out / "model.safetensors", out / "measured.json")
    folder = Folder(str(place.root / DECODER))
    return WholeStage(DECODER, fields, folder, (images,), execute, outputs, needs_ray=False, check=check)
