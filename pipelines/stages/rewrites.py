"""Image shards and their alternative captions -> a column of rewritten captions, as token ids [k], for a
model that rewrites prompts (UniFusion's VERIFI): training reads them at once, which costs no decoding.

An empty array says that the caption itself serves; why is counted in the sidecar.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig
from pipelines.shards.storage import Folder
from pipelines.stages.caption_arrays import CaptionArrayWorker, Made
from repfusion.config import Config, WeightsFolder, naming
from repfusion.data.readers import REWRITES


class RewritesConfig(Config):
    """A column of what a frozen language model makes of the captions when it is asked to rewrite them."""

    kind: Literal["rewrites"] = "rewrites"
    mllm: WeightsFolder | None = None
    """Folder of the language model; None takes that of the trainings that read the column."""
    mllm_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which it computes; None takes that of the trainings that read the column."""
    system: str = Field(default="rewrite", min_length=1)
    """System prompt under which captions are rewritten; the model that reads them has the same."""
    max_new_tokens: int = Field(default=64, ge=1)
    """A longer rewriting counts as endless, and the caption itself serves."""
    batch_size: int = Field(default=64, ge=1)
    """Captions rewritten at once. Changes almost no bytes: a token where two are equally likely."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that rewrites. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.mllm is not None and self.mllm_dtype is not None


def fingerprint_fields(
    name: str, mllm_digest: str, mllm_dtype: str, config: RewritesConfig, captions: Iterable[str]
) -> dict[str, Any]:
    """What decides the bytes of the column of a name: the MLLM's weights, not their place, how they are
    asked, and the names of the captions that are rewritten beside the main one.
    """
    return {
        f"columns.{name}.mllm": mllm_digest,
        f"columns.{name}.mllm_dtype": mllm_dtype,
        f"columns.{name}.system": config.system,
        f"columns.{name}.max_new_tokens": config.max_new_tokens,
        f"columns.{name}.captions": sorted(captions),
    }


class RewritesWorker(CaptionArrayWorker):
    """Makes `NAME.tar` of rewritten captions."""

    column: ClassVar[str] = REWRITES
    with_head: ClassVar[bool] = True

    def __init__(self, folder: Folder, source: Folder, config: RewritesConfig, **reading: Any):
        self.system, self.max_new_tokens = config.system, config.max_new_tokens
        super().__init__(folder, source, config.batch_size, config.actors, **reading)

    def check(self, captions: Sequence[str]) -> None:
        """Raises PromptTooLong where a caption's chat, with room for its rewriting, is too long."""
        from repfusion.llm.chats.batch import tokenise_chats
        from repfusion.llm.chats.format import Chat

        chats = [Chat(caption, system=self.system) for caption in captions]
        tokenise_chats(self.mllm, chats, room=self.max_new_tokens)

    def make(self, captions: Sequence[str], shard: Path | Folder) -> list[Made]:
        """Token ids; none, with the reason, where nothing or no end was written. What a caption has in quotes
        and the language model did not keep is put right, and counted.
        """
        from repfusion.inputs import to_device
        from repfusion.llm.chats.batch import tokenise_chats
        from repfusion.llm.chats.format import Chat
        from repfusion.llm.chats.rewriting import rewrite

        chats = tokenise_chats(self.mllm, [Chat(caption, system=self.system) for caption in captions])
        found = rewrite(self.mllm, to_device(chats, self.device), captions, self.max_new_tokens)
        return [
            Made(
                np.array(one.ids, np.int32),
                f"{one.reason}_rewriting" if one.reason else "mended_quote" if one.num_lost else None,
            )
            for one in found
        ]


def rewrites_stage(
    name: str,
    config: RewritesConfig,
    mllm: Path,
    key: str,
    mllm_dtype: Literal["float32", "bfloat16"],
    images: Stage,
    captions: Stage | None,
    caption_names: tuple[str, ...],
    place: Place,
) -> ShardStage:
    """The stage of a column of rewritten captions, the main ones and those of these names in the stage
    `captions`. `key` is where the configuration says what the MLLM is. Raises ValueError where its folder is
    missing.
    """

    def check() -> None:
        from repfusion.llm.load import load_language_model

        with naming(key):
            load_language_model(mllm, with_head=True, on_meta=True)

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
        RewritesWorker,
        arguments,
        config.actors,
        check=check,
    )
