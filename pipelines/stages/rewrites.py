"""Image shards and their alternative captions -> a column of rewritten captions, as token ids [k], for a
model that rewrites prompts (UniFusion's VERIFI): training reads them at once, which costs no decoding. An
instruction of an editing sample is rewritten in sight of its source images, as a call would have it.

An empty array says that the caption itself serves; why is counted in the sidecar.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.shards.storage import Folder
from pipelines.stages.caption_arrays import (
    AskedCaption,
    CaptionArrayConfig,
    CaptionArrayWorker,
    Made,
    Reading,
    caption_array_stage,
)
from repfusion.data.readers import REWRITES

if TYPE_CHECKING:
    from repfusion.llm.chats.format import Chat


class RewritesConfig(CaptionArrayConfig):
    """A column of what a frozen language model makes of the captions when it is asked to rewrite them."""

    kind: Literal["rewrites"] = "rewrites"
    system: str = Field(default="rewrite", min_length=1)
    """System prompt under which captions are rewritten; the model that reads them has the same."""
    max_new_tokens: int = Field(default=64, ge=1)
    """A longer rewriting counts as endless, and the caption itself serves."""


class RewritesWorker(CaptionArrayWorker):
    """Makes `NAME.tar` of rewritten captions."""

    column: ClassVar[str] = REWRITES
    with_head: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    def __init__(self, folder: Folder, source: Folder, config: RewritesConfig, **reading: Any):
        self.system, self.max_new_tokens = config.system, config.max_new_tokens
        super().__init__(folder, source, config.batch_size, config.actors, **reading)

    def check(self, asked: Sequence[AskedCaption]) -> None:
        """Raises PromptTooLong where a caption's chat, with room for its rewriting, is too long, and
        ValueError where its images do not fit or the language model does not see.
        """
        from repfusion.llm.chats.batch import tokenise_chats

        tokenise_chats(self.mllm, self._chats(asked), room=self.max_new_tokens)

    def _chats(self, asked: Sequence[AskedCaption]) -> "list[Chat]":
        from repfusion.images.decode import read_pixels
        from repfusion.llm.chats.format import Chat

        return [Chat(one.caption, [*map(read_pixels, one.sources)], self.system) for one in asked]

    def make(self, asked: Sequence[AskedCaption], shard: Path | Folder) -> list[Made]:
        """Token ids; none, with the reason, where nothing or no end was written. What a caption has in quotes
        and the language model did not keep is put right, and counted.
        """
        from repfusion.inputs import to_device
        from repfusion.llm.chats.batch import tokenise_chats
        from repfusion.llm.chats.rewriting import rewrite

        chats = to_device(tokenise_chats(self.mllm, self._chats(asked)), self.device)
        found = rewrite(self.mllm, chats, [one.caption for one in asked], self.max_new_tokens)
        return [
            Made(
                np.array(one.ids, np.int32),
                f"{one.reason}_rewriting" if one.reason else "mended_quote" if one.num_lost else None,
            )
            for one in found
        ]


def rewrites_stage(name: str, config: RewritesConfig, reading: Reading, place: Place) -> ShardStage:
    """The stage of a column of this kind; raises what `caption_array_stage` raises."""
    fields = {"system": config.system, "max_new_tokens": config.max_new_tokens}
    return caption_array_stage(RewritesWorker, name, config, reading, fields, place)
