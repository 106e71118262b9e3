"""Image shards and their alternative captions -> a column of prompt features (unpadded [m, d]) for the
text-only baseline.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError
from pipelines.stages.caption_arrays import CaptionArrayWorker, Made
from repfusion.config import Config, WeightsFolder, naming
from repfusion.data.readers import PROMPT_FEATURES

PROMPT_TEMPLATE = "{bos}{caption}"


class PromptFeaturesConfig(Config):
    """A column of what a frozen language model makes of the captions, made where a training reads it."""

    kind: Literal["prompt_features"] = "prompt_features"
    mllm: WeightsFolder | None = None
    """Folder of the language model; None takes that of the trainings that read the column."""
    mllm_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which it computes; None takes that of the trainings that read the column."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision in which the features are stored. A value beyond float16's range is an error."""
    batch_size: int = Field(default=64, ge=1)
    """Captions encoded at once. Counts as changing no bytes: what it does change is below float16's rounding,
    almost always, and in float32's last digits.
    """
    actors: ActorsConfig = ActorsConfig()
    """The pool that encodes. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.mllm is not None and self.mllm_dtype is not None


def fingerprint_fields(
    name: str, mllm_digest: str, mllm_dtype: str, config: PromptFeaturesConfig, captions: Iterable[str]
) -> dict[str, Any]:
    """What decides the bytes of the column of a name: the MLLM's weights, not their place, and the names of
    the captions that are encoded beside the main one.
    """
    return {
        f"columns.{name}.mllm": mllm_digest,
        f"columns.{name}.mllm_dtype": mllm_dtype,
        f"columns.{name}.dtype": config.dtype,
        f"columns.{name}.captions": sorted(captions),
        f"columns.{name}.prompt_template": PROMPT_TEMPLATE,
    }


class PromptFeaturesWorker(CaptionArrayWorker):
    """Makes `NAME.tar` of prompt features."""

    column: ClassVar[str] = PROMPT_FEATURES

    def __init__(self, folder: Folder, source: Folder, config: PromptFeaturesConfig, **reading: Any):
        self.dtype = config.dtype
        super().__init__(folder, source, config.batch_size, config.actors, **reading)

    def make(self, captions: Sequence[str], shard: Path | Folder) -> list[Made]:
        """Last-layer states, unpadded. Raises ShardError where one is not finite as it is stored."""
        import torch

        from repfusion.conditioning.text_embed import encode_text
        from repfusion.inputs import to_device

        rows = encode_text(self.mllm, to_device(self.mllm.tokenise(captions), self.device))
        # one transfer from the device for all of them
        stored = torch.cat(rows).to(getattr(torch, self.dtype)).cpu().split([len(row) for row in rows])
        for caption, row in zip(captions, stored, strict=True):
            if not row.isfinite().all():
                raise ShardError(
                    f"shard {shard}.tar: prompt features of {caption!r} are not finite in {self.dtype}"
                    + ("; set its column's dtype=float32" if self.dtype == "float16" else "")
                )
        return [Made(row.numpy()) for row in stored]


def prompt_features_stage(
    name: str,
    config: PromptFeaturesConfig,
    mllm: Path,
    key: str,
    mllm_dtype: Literal["float32", "bfloat16"],
    images: Stage,
    captions: Stage | None,
    caption_names: tuple[str, ...],
    place: Place,
) -> ShardStage:
    """The stage of a column of prompt features, of the main captions and of those of these names in the
    stage `captions`. `key` is where the configuration says what the MLLM is. Raises ValueError where its
    folder is missing.
    """

    def check() -> None:
        from repfusion.llm.load import load_language_model

        with naming(key):
            load_language_model(mllm, on_meta=True)

    digest = place.digests.folder(mllm, key)
    arguments = {
        "source": images.folder,
        "config": config,
        "mllm": mllm,
        "mllm_dtype": mllm_dtype,
        "captions": None if captions is None else captions.folder,
        "names": caption_names,
    }
    return ShardStage(
        name,
        fingerprint_fields(name, digest, mllm_dtype, config, caption_names),
        place.data / name,
        (images,) if captions is None else (images, captions),
        PromptFeaturesWorker,
        arguments,
        config.actors,
        check=check,
    )
