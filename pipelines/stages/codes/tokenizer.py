"""The stage `tokenizer`: curated images -> the tokenizer of images into codes, `stage:tokenizer` to columns
of codes and to trainings.

ROOT/tokenizer/model/         the tokenizer, what was measured of it and a picture
ROOT/tokenizer/model.state    where a training that was cut off goes on; set aside with it when it is stale
"""

from pathlib import Path
from typing import Any

from pipelines.dag import Place, Stage, WholeStage
from pipelines.stages.decoder import Rebuilding, model_folder
from repfusion.config import naming
from repfusion.decoding.codes.config import TokenizerRecipe, TokenizerTrainingConfig
from repfusion.latents.load import EncoderConfig

TOKENIZER = "tokenizer"
"""Name of the stage, of its folder and of its section."""


class TokenizerStageConfig(TokenizerRecipe):
    """The tokenizer that a workflow trains on its own images, in the process that runs the workflow."""

    encoder: EncoderConfig = EncoderConfig()
    """The frozen tower whose features have the semantic codes."""


def tokenizer_folder(root: Path) -> Path:
    """Where the stage leaves the tokenizer of a workflow, by its root."""
    return model_folder(root, TOKENIZER)


def tokenizer_stage(config: TokenizerStageConfig, images: Stage, place: Place) -> WholeStage:
    """The stage of a workflow's tokenizer. Raises ValueError where a folder is missing."""
    key = f"{TOKENIZER}.encoder"
    given = {name: getattr(config, name) for name in TokenizerRecipe.model_fields}
    made = Rebuilding(TOKENIZER, config, config.encoder, key)

    def training(source: Path, out: Path) -> TokenizerTrainingConfig:
        return TokenizerTrainingConfig(**given, images=source, out=out, encoder=config.encoder)

    def train(source: Path, out: Path) -> dict[str, Any]:
        from repfusion.decoding.codes.train import train_tokenizer

        return train_tokenizer(training(source, out))

    def check() -> None:
        from repfusion.decoding.codes.train import network_config

        made.check()
        with naming(key):
            network_config(training(images.folder.path, tokenizer_folder(place.root)))

    return made.stage(images, place, train, check)
