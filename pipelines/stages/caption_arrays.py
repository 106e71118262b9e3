"""Captions of image shards, and alternative ones -> a column that holds an array for each caption.

`KEY.COLUMN.npy` belongs to the main caption, `KEY.long.COLUMN.npy` to the column `long`. What is made of each
distinct caption of a shard is made and stored once; where the caption returns, `KEY.COLUMN.ref` holds the
name of the member that stores it. A column that reads instructions with their source images holds these
encoded, those of one shard at a time.
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
from repfusion.data.source_images import is_source, source_members


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


@dataclass(frozen=True, order=True)
class AskedCaption:
    """A caption, and the encoded source images that it is an instruction for, where they are read with it."""

    caption: str
    sources: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Made:
    """An array, and the reason for which it is not what was asked for, which is counted."""

    array: np.ndarray
    reason: str | None = None


@dataclass(frozen=True)
class _Kept:
    """Where the npy bytes of a caption, or of an instruction, lie in the scratch file."""

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
    reads_sources: ClassVar[bool] = False
    """Whether captions that are instructions for source images are read with these, or by themselves."""

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
        from repfusion.llm.load import family_of, load_language_model

        if names and captions is None:
            raise ValueError(f"captions {', '.join(names)} are asked for, but there is no folder of captions")
        torch.set_num_threads(max(1, int(actors.num_cpus)))
        self.folder, self.source = folder, source
        self.captions, self.names = captions, names
        key = f"columns.{folder.name}"
        self.device = find_device(actors.num_gpus > 0, mllm_dtype, f"{key}.mllm_dtype")
        self._room = BatchRoom(batch_size, self.device, f"{key}.batch_size")
        dtype = getattr(torch, mllm_dtype)
        sees = self.reads_sources and family_of(mllm).sees
        self.mllm = load_language_model(mllm, dtype, self.with_head, with_eyes=sees).to(self.device)
        self._computing = Lock()

    def make(self, asked: Sequence[AskedCaption], shard: Path | Folder) -> list[Made]:
        """What each caption becomes; `shard` is where they are from, for messages. Raises ShardError."""
        raise NotImplementedError

    def check(self, asked: Sequence[AskedCaption]) -> None:
        """Raises PromptTooLong where a caption does not fit into the language model's context, and ValueError
        where its images are not readable for that model.
        """
        self.mllm.check_lengths([one.caption for one in asked])

    def __call__(self, job: ShardJob) -> Sidecar:
        asked = self._read(job.name)
        self._refuse_unreadable(asked, job.name)
        distinct = {one for own in asked.values() for one in own.values()}
        with (
            ShardCommit(
                self.folder, job.name, job.fingerprint, job.inputs, ("torch", "transformers")
            ) as commit,
            tempfile.TemporaryFile(dir=commit.staging) as scratch,
        ):
            with self._computing:
                kept = self._keep(distinct, scratch, job.name)
            for key, own in asked.items():
                for one in own.values():
                    if (reason := kept[one].reason) is not None:
                        commit.drop(key, reason, one.caption)
            self._write(asked, kept, scratch, commit)
            return commit.commit(f"{job.name}.tar")

    def member(self, caption: str) -> str:
        """The member that belongs to a caption, `txt` or `NAME.txt`."""
        return CaptionArray().member(self.column, caption)

    def _read(self, name: str) -> dict[str, dict[str, AskedCaption]]:
        """What is asked of each key, by the member that will hold what becomes of it."""
        asked: dict[str, dict[str, AskedCaption]] = {}
        wanted = _CaptionAndSources() if self.reads_sources else (CAPTION,)
        sources = {}
        for key, members in self._samples(self.source, name, wanted):
            try:
                sources[key] = tuple(members[one] for one in source_members(members))
            except ValueError as error:
                raise ShardError(f"shard {self.source / name}.tar, key {key}: {error}") from error
            asked[key] = {self.member(CAPTION): self._one(members[CAPTION], sources[key])}
        if self.captions is None or not self.names:
            return asked
        for key, members in self._samples(self.captions, name, [f"{name}.{CAPTION}" for name in self.names]):
            if key not in asked:
                raise ShardError(
                    f"shard {self.captions / name}.tar, key {key}: not among the keys of "
                    f"{self.source / name}.tar; re-run the stage 'captions'"
                )
            asked[key] |= {self.member(one): self._one(text, sources[key]) for one, text in members.items()}
        return asked

    @staticmethod
    def _one(caption: bytes, sources: tuple[bytes, ...]) -> AskedCaption:
        return AskedCaption(caption.decode().strip(), sources)

    def _samples(
        self, folder: Folder, name: str, wanted: Container[str]
    ) -> Iterable[tuple[str, dict[str, bytes]]]:
        return read_samples(folder, f"{name}.tar", read_sidecar(folder, name), wanted)

    def _refuse_unreadable(self, asked: Mapping[str, Mapping[str, AskedCaption]], name: str) -> None:
        """Raises ShardError, naming the first key, where the language model cannot read what is asked."""
        from repfusion.llm.base import PromptTooLong

        for key, own in asked.items():
            place = f"shard {self.source / name}.tar, key {key}"
            try:
                self.check(list(own.values()))
            except PromptTooLong as error:
                raise ShardError(
                    f"{place}: a caption does not fit the MLLM {self.mllm.folder}: {error} "
                    "(curate.max_caption_tokens, and max_tokens of a captions column, leave such ones out "
                    "and count them)"
                ) from error
            except ValueError as error:
                raise ShardError(f"{place}: {error}") from error

    def _keep(self, asked: set[AskedCaption], scratch: IO[bytes], name: str) -> dict[AskedCaption, _Kept]:
        """Writes the npy bytes of what each becomes to `scratch`: a shard's arrays may not fit into memory.
        Captions of like length share a batch, so that little is padded, those with images and those without
        apart.
        """
        kept: dict[AskedCaption, _Kept] = {}
        texts = sorted({one.caption for one in asked})
        lengths = dict(zip(texts, map(len, self.mllm.token_ids(texts)), strict=True))
        ordered = sorted(asked, key=lambda one: (len(one.sources), lengths[one.caption], one))
        for start in range(0, len(ordered), self._room.most):
            batch = ordered[start : start + self._room.most]
            parts = self._room(lambda some: self.make(some, self.source / name), batch)
            for one, made in zip(batch, itertools.chain(*parts), strict=True):
                data = npy_bytes(made.array)
                kept[one] = _Kept(scratch.tell(), len(data), made.reason)
                scratch.write(data)
        return kept

    @staticmethod
    def _write(
        asked: Mapping[str, Mapping[str, AskedCaption]],
        kept: Mapping[AskedCaption, _Kept],
        scratch: IO[bytes],
        commit: ShardCommit,
    ) -> None:
        homes: dict[AskedCaption, str] = {}
        with tar_shard(commit) as samples:
            for key, own in asked.items():
                members: dict[str, bytes] = {}
                for member, one in sorted(own.items()):
                    if (home := homes.get(one)) is not None:
                        members[f"{member.removesuffix('.npy')}.ref"] = home.encode()
                        continue
                    homes[one] = f"{key}.{member}"
                    scratch.seek(kept[one].offset)
                    members[member] = scratch.read(kept[one].size)
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
        from repfusion.llm.load import family_of, load_language_model

        with naming(reading.key):
            sees = worker.reads_sources and family_of(reading.mllm).sees
            load_language_model(reading.mllm, with_head=worker.with_head, on_meta=True, with_eyes=sees)

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
