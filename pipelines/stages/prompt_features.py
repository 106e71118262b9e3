"""Image shards and their alternative captions -> a column of prompt features (unpadded [m, d]) for the
text-only baseline.

`KEY.prompt_features.npy` belongs to the main caption, `KEY.long.prompt_features.npy` to the column `long`.
Each distinct caption of a shard is encoded and stored once; where it returns, `KEY.prompt_features.ref` holds
the name of the member that stores it.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import IO, Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_bytes
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from repfusion.config import Config, WeightsFolder, naming
from repfusion.data.readers import PROMPT_FEATURES, CaptionArray

PROMPT_TEMPLATE = "{bos}{caption}"


def prompt_member(caption: str) -> str:
    """The member that holds the features of a caption, `txt` or `NAME.txt`."""
    return CaptionArray().member(PROMPT_FEATURES, caption)


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


class PromptFeaturesWorker:
    """Makes `NAME.tar` of prompt features; the MLLM is loaded once.

    Args:
        folder: of the stage.
        source: folder of the image shards, whose captions are read.
        config: the stage's.
        mllm: folder of the frozen MLLM.
        mllm_dtype: precision in which it computes.
        captions: folder of the column of alternative captions, if there is one.
        names: which of them to encode, as the `captions` stage calls them.
    """

    concurrency: ClassVar[int] = 2

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        config: PromptFeaturesConfig,
        mllm: Path,
        mllm_dtype: Literal["float32", "bfloat16"],
        captions: Folder | None = None,
        names: tuple[str, ...] = (),
    ):
        import torch

        from repfusion.llm.load import load_language_model

        if names and captions is None:
            raise ValueError(f"captions {', '.join(names)} are asked for, but there is no folder of captions")
        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        self.folder, self.source, self.config = folder, source, config
        self.captions, self.names = captions, names
        self.device = torch.device("cuda" if config.actors.num_gpus else "cpu")
        self.mllm = load_language_model(mllm, getattr(torch, mllm_dtype)).to(self.device)
        self._computing = Lock()

    def __call__(self, job: ShardJob) -> Sidecar:
        captions = self._read(job.name)
        self._refuse_long(captions, job.name)
        distinct = {caption for own in captions.values() for caption in own.values()}
        with (
            ShardCommit(
                self.folder, job.name, job.fingerprint, job.inputs, ("torch", "transformers")
            ) as commit,
            tempfile.TemporaryFile(dir=commit.staging) as scratch,
        ):
            with self._computing:
                places = self._encode(distinct, scratch, job.name)
            self._write(captions, places, scratch, commit)
            return commit.commit(f"{job.name}.tar")

    def _read(self, name: str) -> dict[str, dict[str, str]]:
        """Captions of each key, by the member that will hold their features."""
        from repfusion.data.config import CAPTION

        captions = {
            key: {prompt_member(CAPTION): members[CAPTION].decode().strip()}
            for key, members in self._samples(self.source, name, [CAPTION])
        }
        if self.captions is None or not self.names:
            return captions
        for key, members in self._samples(self.captions, name, [f"{name}.{CAPTION}" for name in self.names]):
            if key not in captions:
                raise ShardError(
                    f"shard {self.captions / name}.tar, key {key}: not among the keys of "
                    f"{self.source / name}.tar; re-run the stage 'captions'"
                )
            captions[key] |= {
                prompt_member(member): data.decode().strip() for member, data in members.items()
            }
        return captions

    def _samples(
        self, folder: Folder, name: str, wanted: list[str]
    ) -> Iterable[tuple[str, dict[str, bytes]]]:
        return read_samples(folder, f"{name}.tar", read_sidecar(folder, name), wanted)

    def _refuse_long(self, captions: dict[str, dict[str, str]], name: str) -> None:
        """Raises ShardError, naming the first key, where a caption does not fit into the MLLM's context."""
        from repfusion.llm.base import PromptTooLong

        for key, own in captions.items():
            try:
                self.mllm.check_lengths(list(own.values()))
            except PromptTooLong as error:
                raise ShardError(
                    f"shard {self.source / name}.tar, key {key}: a caption does not fit the MLLM "
                    f"{self.mllm.folder}: {error} (curate.max_caption_tokens, and max_tokens of a captions "
                    "column, leave such ones out and count them)"
                ) from error

    def _encode(self, captions: set[str], scratch: IO[bytes], name: str) -> dict[str, tuple[int, int]]:
        """Writes each caption's npy bytes to `scratch`: a shard's features may not fit into memory. Returns
        where they lie, as (offset, size). Captions of like length share a batch, so that little is padded.
        """
        places: dict[str, tuple[int, int]] = {}
        ordered = sorted(captions, key=lambda caption: (len(caption), caption))
        for start in range(0, len(ordered), self.config.batch_size):
            batch = ordered[start : start + self.config.batch_size]
            for caption, data in zip(batch, self._encode_batch(batch, name), strict=True):
                places[caption] = (scratch.tell(), len(data))
                scratch.write(data)
        return places

    def _encode_batch(self, captions: list[str], name: str) -> Iterable[bytes]:
        import torch

        from repfusion.conditioning.text_embed import encode_text
        from repfusion.inputs import to_device

        rows = encode_text(self.mllm, to_device(self.mllm.tokenise(captions), self.device))
        # one transfer from the device for all of them
        stored = torch.cat(rows).to(getattr(torch, self.config.dtype)).cpu().split([len(row) for row in rows])
        for caption, row in zip(captions, stored, strict=True):
            if not row.isfinite().all():
                raise ShardError(
                    f"shard {self.source / name}.tar: prompt features of {caption!r} are not finite in "
                    f"{self.config.dtype}"
                    + ("; set its column's dtype=float32" if self.config.dtype == "float16" else "")
                )
        return (npy_bytes(row.numpy()) for row in stored)

    @staticmethod
    def _write(
        captions: dict[str, dict[str, str]],
        places: dict[str, tuple[int, int]],
        scratch: IO[bytes],
        commit: ShardCommit,
    ) -> None:
        homes: dict[str, str] = {}
        with tar_shard(commit) as samples:
            for key, own in captions.items():
                members: dict[str, bytes] = {}
                for member, caption in sorted(own.items()):
                    if (home := homes.get(caption)) is not None:
                        members[f"{member.removesuffix('.npy')}.ref"] = home.encode()
                        continue
                    homes[caption] = f"{key}.{member}"
                    offset, size = places[caption]
                    scratch.seek(offset)
                    members[member] = scratch.read(size)
                samples.write(key, members)


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
