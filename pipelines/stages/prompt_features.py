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
    AskedCaption,
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
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the language model's layers; auto: on a GPU. Where it cannot be done they run as they
    are, with a warning. Counts as changing no more than `batch_size` does.
    """

    @property
    def compiles(self) -> bool:
        """Whether the layers are compiled."""
        return self.actors.num_gpus > 0 if self.compile == "auto" else self.compile


BUCKET = 32
"""Where layers are compiled, prompts are as long as a multiple of this, so that few lengths are met."""
COST_OF_EAGER = "Reading takes longer so"


class PromptFeaturesWorker(CaptionArrayWorker):
    """Makes `NAME.tar` of prompt features."""

    column: ClassVar[str] = PROMPT_FEATURES

    def __init__(self, folder: Folder, source: Folder, config: PromptFeaturesConfig, **reading: Any):
        self.dtype = config.dtype
        super().__init__(folder, source, config.batch_size, config.actors, **reading)
        self.is_static = config.compiles
        if config.compiles:
            from repfusion.devices.compiling import compilation_for

            self.mllm.bucket = BUCKET
            what = "the language model's layers"
            self.mllm.compile_layers(compilation_for(self.device.type, what, COST_OF_EAGER))

    def make(self, asked: Sequence[AskedCaption], shard: Path | Folder) -> list[Made]:
        """Last-layer states of captions, unpadded. Raises ShardError where one is not finite as kept."""
        import torch

        from repfusion.conditioning.text_embed import encode_text
        from repfusion.inputs import to_device

        captions = [one.caption for one in asked]
        filling = [captions[0]] * (self._room.most - len(captions)) if self.is_static else []
        prefix = to_device(self.mllm.tokenise([*captions, *filling]), self.device)
        rows = encode_text(self.mllm, prefix)[: len(captions)]
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
