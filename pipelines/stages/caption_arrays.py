"""Captions of image shards, and alternative ones -> a column that holds an array for each caption.

`KEY.COLUMN.npy` belongs to the main caption, `KEY.long.COLUMN.npy` to the column `long`. What is made of each
distinct caption of a shard is made and stored once; where the caption returns, `KEY.COLUMN.ref` holds the
name of the member that stores it.
"""

import itertools
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_bytes
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from repfusion.config import Config, WeightsFolder, naming
from repfusion.data.config import CAPTION
from repfusion.data.readers import CaptionArray
from repfusion.data.source_images import is_source


class CaptionArrayConfig(Config):
    """What columns of arrays have alike that a language model makes of captions."""

    mllm: WeightsFolder | None = None
    """Folder of the language model; None takes that of the trainings that read the column."""
    mllm_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Precision in which it computes; None takes that of the trainings that read the column. auto: bfloat16
    where the actors have a GPU, as a training on one holds frozen weights whatever it was told, float32 on a
    CPU.
    """
    batch_size: int = Field(default=64, ge=1)
    """Captions read at once, those of like length together. Counts as changing no bytes: what it does change
    is below float16's rounding, almost always, in float32's last digits, and a written token where two are
    equally likely. Where a batch exceeds a GPU's memory, its halves are read, with a warning.
    """
    actors: ActorsConfig = ActorsConfig()
    """The pool that reads. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.mllm is not None and self.mllm_dtype is not None


@dataclass(frozen=True)
class Reading:
    """Who reads which captions."""

    mllm: Path
    key: str
    """Where the configuration says what the language model is."""
    mllm_dtype: Literal["float32", "bfloat16"]
    images: Stage
    """Has the main captions."""
    captions: Stage | None = None
    """Has alternative ones."""
    names: tuple[str, ...] = ()
    """Which of these are read."""


@dataclass(frozen=True)
class Made:
    """An array, and the reason for which it is not what was asked for, which is counted."""

    array: np.ndarray
    reason: str | None = None


@dataclass(frozen=True)
class _Kept:
    """Where a caption's npy bytes lie in the scratch file."""

    offset: int
    size: int
    reason: str | None


class _CaptionAndSources:
    """Extensions of a main caption and of source pictures."""

    def __contains__(self, extension: object) -> bool:
        return extension == CAPTION or (isinstance(extension, str) and is_source(extension))


class CaptionArrayWorker:
    """Makes `NAME.tar` of arrays that a language model, loaded once, makes of captions; `make` says what.

    Args:
        folder: of the stage.
        source: folder of the image shards, whose captions are read.
        batch_size: captions that are given to `make` at once.
        actors: of the stage.
        mllm: folder of the language model.
        mllm_dtype: precision in which it computes.
        captions: folder of the column of alternative captions, if there is one.
        names: which of them to read, as the `captions` stage calls them.
    """

    concurrency: ClassVar[int] = 2
    column: ClassVar[str]
    """Kind of the column, the name of its members."""
    with_head: ClassVar[bool] = False
    """Whether the language model scores next tokens."""
    takes_edits: ClassVar[bool] = True
    """Whether captions that are instructions for source pictures are taken without these."""

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        batch_size: int,
        actors: ActorsConfig,
        mllm: Path,
        mllm_dtype: Literal["float32", "bfloat16"],
        captions: Folder | None = None,
        names: tuple[str, ...] = (),
    ):
        import torch

        from repfusion.devices.placing import BatchRoom, find_device
        from repfusion.llm.load import load_language_model

        if names and captions is None:
            raise ValueError(f"captions {', '.join(names)} are asked for, but there is no folder of captions")
        torch.set_num_threads(max(1, int(actors.num_cpus)))
        self.folder, self.source = folder, source
        self.captions, self.names = captions, names
        key = f"columns.{folder.name}"
        self.device = find_device(actors.num_gpus > 0, mllm_dtype, f"{key}.mllm_dtype")
        self._room = BatchRoom(batch_size, self.device, f"{key}.batch_size")
        dtype = getattr(torch, mllm_dtype)
        self.mllm = load_language_model(mllm, dtype, self.with_head).to(self.device)
        self._computing = Lock()

    def make(self, captions: Sequence[str], shard: Path | Folder) -> list[Made]:
        """What each caption becomes; `shard` is where they are from, for messages. Raises ShardError."""
        raise NotImplementedError

    def check(self, captions: Sequence[str]) -> None:
        """Raises PromptTooLong where a caption does not fit into the language model's context."""
        self.mllm.check_lengths(captions)

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
                kept = self._keep(distinct, scratch, job.name)
            for key, own in captions.items():
                for caption in own.values():
                    if (reason := kept[caption].reason) is not None:
                        commit.drop(key, reason, caption)
            self._write(captions, kept, scratch, commit)
            return commit.commit(f"{job.name}.tar")

    def member(self, caption: str) -> str:
        """The member that belongs to a caption, `txt` or `NAME.txt`."""
        return CaptionArray().member(self.column, caption)

    def _read(self, name: str) -> dict[str, dict[str, str]]:
        """Captions of each key, by the member that will hold what they become."""
        captions: dict[str, dict[str, str]] = {}
        for key, members in self._samples(self.source, name, _CaptionAndSources()):
            if len(members) > 1 and not self.takes_edits:
                raise ShardError(
                    f"shard {self.source / name}.tar, key {key}: an editing sample, whose instruction would "
                    f"be read without its source images; leave the column {self.column!r} out for such data"
                )
            captions[key] = {self.member(CAPTION): members[CAPTION].decode().strip()}
        if self.captions is None or not self.names:
            return captions
        for key, members in self._samples(self.captions, name, [f"{name}.{CAPTION}" for name in self.names]):
            if key not in captions:
                raise ShardError(
                    f"shard {self.captions / name}.tar, key {key}: not among the keys of "
                    f"{self.source / name}.tar; re-run the stage 'captions'"
                )
            captions[key] |= {self.member(member): data.decode().strip() for member, data in members.items()}
        return captions

    def _samples(
        self, folder: Folder, name: str, wanted: Container[str]
    ) -> Iterable[tuple[str, dict[str, bytes]]]:
        return read_samples(folder, f"{name}.tar", read_sidecar(folder, name), wanted)

    def _refuse_long(self, captions: Mapping[str, Mapping[str, str]], name: str) -> None:
        """Raises ShardError, naming the first key, where a caption does not fit into the MLLM's context."""
        from repfusion.llm.base import PromptTooLong

        for key, own in captions.items():
            try:
                self.check(list(own.values()))
            except PromptTooLong as error:
                raise ShardError(
                    f"shard {self.source / name}.tar, key {key}: a caption does not fit the MLLM "
                    f"{self.mllm.folder}: {error} (curate.max_caption_tokens, and max_tokens of a captions "
                    "column, leave such ones out and count them)"
                ) from error

    def _keep(self, captions: set[str], scratch: IO[bytes], name: str) -> dict[str, _Kept]:
        """Writes each caption's npy bytes to `scratch`: a shard's arrays may not fit into memory. Captions of
        like length share a batch, so that little is padded.
        """
        kept: dict[str, _Kept] = {}
        texts = sorted(captions)
        lengths = dict(zip(texts, map(len, self.mllm.token_ids(texts)), strict=True))
        ordered = sorted(texts, key=lambda caption: (lengths[caption], caption))
        for start in range(0, len(ordered), self._room.most):
            batch = ordered[start : start + self._room.most]
            parts = self._room(lambda some: self.make(some, self.source / name), batch)
            for caption, made in zip(batch, itertools.chain(*parts), strict=True):
                data = npy_bytes(made.array)
                kept[caption] = _Kept(scratch.tell(), len(data), made.reason)
                scratch.write(data)
        return kept

    @staticmethod
    def _write(
        captions: Mapping[str, Mapping[str, str]],
        kept: Mapping[str, _Kept],
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
                    scratch.seek(kept[caption].offset)
                    members[member] = scratch.read(kept[caption].size)
                samples.write(key, members)


def caption_array_stage(
    worker: type[CaptionArrayWorker],
    name: str,
    config: CaptionArrayConfig,
    reading: Reading,
    fields: Mapping[str, Any],
    place: Place,
) -> ShardStage:
    """The stage of a column. `fields` decide its bytes, beside weights, their precision and the captions'
    names. Raises ValueError where the language model's folder is missing.
    """

    def check() -> None:
        from repfusion.llm.load import load_language_model

        with naming(reading.key):
            load_language_model(reading.mllm, with_head=worker.with_head, on_meta=True)

    decides = {
        "mllm": place.digests.folder(reading.mllm, reading.key),
        "mllm_dtype": reading.mllm_dtype,
        "captions": sorted(reading.names),
        **fields,
    }
    arguments = {
        "source": reading.images.folder,
        "config": config,
        "mllm": reading.mllm,
        "mllm_dtype": reading.mllm_dtype,
        "captions": None if reading.captions is None else reading.captions.folder,
        "names": reading.names,
    }
    return ShardStage(
        name,
        {f"columns.{name}.{field}": value for field, value in decides.items()},
        place.data / name,
        (reading.images,) if reading.captions is None else (reading.images, reading.captions),
        worker,
        arguments,
        config.actors,
        check=check,
    )
