"""Image shards and their alternative captions -> a column of prompt features (unpadded [m, d]) for the
text-only baseline.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipelines.dag import Place, ShardStage
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError
from pipelines.stages.caption_arrays import (
    CaptionArrayConfig,
    CaptionArrayWorker,
    Made,
    Reading,
    caption_array_stage,
)
from repfusion.data.readers import PROMPT_FEATURES

PROMPT_TEMPLATE = "{bos}{caption}"


class PromptFeaturesConfig(CaptionArrayConfig):
    """A column of what a frozen language model makes of the captions, made where a training reads it."""

    kind: Literal["prompt_features"] = "prompt_features"
    dtype: Literal["float16", "float32"] = "float16"
    """Precision in which the features are stored. A value beyond float16's range is an error."""


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
    name: str, config: PromptFeaturesConfig, reading: Reading, place: Place
) -> ShardStage:
    """The stage of a column of this kind; raises what `caption_array_stage` raises."""
    fields = {"dtype": config.dtype, "prompt_template": PROMPT_TEMPLATE}
    return caption_array_stage(PromptFeaturesWorker, name, config, reading, fields, place)
