"""WebDataset tars (an image and txt or json for each key, the layout of BLIP-3o) -> raw image-text shards,
one for each.

Every sample of the input ends as a sample or as a counted drop.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, shard_name
from pipelines.shards.tars import TarSamples, read_samples, tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import InputFile, find_inputs
from pipelines.sources.raw_samples import (
    IMAGE_ENDINGS,
    OWN_FIELDS,
    PACKAGES,
    BadEntry,
    SampleMaker,
    printable,
)
from repfusion.config import Config

POSITION_DIGITS = 6
NUM_COUNTED_TARS = 8
NUM_COUNTED_SAMPLES = 500
"""How much is read to estimate the samples in all tars: the first so many of so many tars."""


class TarsConfig(Config):
    """WebDataset tars to take in, each of which becomes a shard."""

    kind: Literal["tars"] = "tars"
    path: str
    """A .tar file, a folder of them or a pattern such as `data/*/*.tar`; local or any fsspec URL. Shards are
    numbered in the order of the names.
    """
    caption_field: str | None = None
    """Field of each sample's json that holds the caption; None takes the txt member."""
    on_truncated: Literal["fail", "keep"] = "fail"
    """What to do with a tar that is cut short, or damaged from some byte on: fail its shard, or keep the
    samples before the damage and count one drop, `truncated_tar`. Changes no bytes of other shards.
    """
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""


@dataclass(frozen=True)
class TarsSource:
    """Tars that others wrote, read by `ingest`."""

    config: TarsConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields = fingerprint_fields(self.config, ingest)
        return [read_stage(TarWorker, self.config, fields, jobs(self.config), ingest, place)]

    def entries(self) -> Entries:
        names = [job.name for job in jobs(self.config)]
        return Entries(num_entries(self.config), names, partial(probe_jobs, self.config))


def fingerprint_fields(config: TarsConfig, ingest: IngestConfig) -> dict[str, Any]:
    """What decides the bytes, beside the tars themselves."""
    own = {"source.kind": config.kind, "source.caption_field": config.caption_field}
    return {**own, **image_fields(ingest)}


def find_tars(config: TarsConfig) -> tuple[InputFile, ...]:
    """Raises ValueError where there is none."""
    return find_inputs(config.path, (".tar",), "source.path", config.options)


def jobs(config: TarsConfig) -> tuple[ShardJob, ...]:
    """One for each tar, whatever its size. Raises ValueError where there is none."""
    return tuple(_job(index, file) for index, file in enumerate(find_tars(config)))


def _job(index: int, file: InputFile, **arguments: int) -> ShardJob:
    return ShardJob(
        shard_name(index), "", {"file": file.identity}, {"index": index, "file": file, **arguments}
    )


def num_entries(config: TarsConfig) -> int:
    """About how many samples there are: the bytes of all tars by those of the first samples of some."""
    tars = find_tars(config)
    samples, num_bytes = 0, 0
    for _, file in _spread(tars, NUM_COUNTED_TARS):
        read = read_samples(file.folder(config.options), file.base)
        try:
            for _, members in itertools.islice(read, NUM_COUNTED_SAMPLES):
                samples += 1
                num_bytes += sum(512 + len(data) + -len(data) % 512 for data in members.values())
        except ShardError:
            continue  # the worker says what is wrong with it
    return round(samples / max(1, num_bytes) * sum(file.size for file in tars))


def probe_jobs(config: TarsConfig, wanted: int, offset: int = 0) -> tuple[ShardJob, ...]:
    """Jobs that read about `wanted` samples, the first ones of tars spread evenly."""
    chosen = _spread(find_tars(config), min(wanted, NUM_COUNTED_TARS), offset)
    return tuple(_job(index, file, limit=-(-wanted // len(chosen))) for index, file in chosen)


def _spread(tars: tuple[InputFile, ...], number: int, offset: int = 0) -> list[tuple[int, InputFile]]:
    step = max(1, len(tars) // number)
    return list(enumerate(tars))[offset % step :: step][:number]


class TarWorker:
    """Makes `NAME.tar` from one foreign tar.

    A key is the number of the tar and the position in it; the original one is `source_key` in the json,
    beside `source_file`. The fields of the sample's own json stay, but for those that are ours.

    Reasons of drops: no_image, no_caption, undecodable_caption, undecodable_metadata, duplicate_key,
    truncated_tar, and those of ImageFitter.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: TarsConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, PACKAGES) as commit:
            with tar_shard(commit) as samples:
                self._copy(job, commit, samples)
            commit.check_drops(self.ingest.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _copy(self, job: ShardJob, commit: ShardCommit, samples: TarSamples) -> None:
        file: InputFile = job.arguments["file"]
        seen: set[str] = set()
        for position, found in enumerate(self._read(job)):
            if position == 10**POSITION_DIGITS:
                raise ShardError(f"{file.url}: more than {position:,} samples; split the tar")
            key = f"{job.arguments['index']:05d}{position:0{POSITION_DIGITS}d}"
            if isinstance(found, BadEntry):
                commit.drop(key, found.reason, found.detail)
                continue
            source_key, members = found
            try:
                if source_key in seen:
                    raise BadEntry("duplicate_key", "the tar has this key before")
                image, caption, metadata = self._parse(members)
                metadata |= {"source_key": source_key, "source_file": file.name}
                made = self._make(key, image, caption, metadata)
            except BadEntry as error:
                commit.drop(key, error.reason, f"{printable(source_key)}: {error.detail}")
            else:
                samples.write(key, made)
            seen.add(source_key)

    def _read(self, job: ShardJob) -> Iterator[tuple[str, dict[str, bytes]] | BadEntry]:
        """The tar's samples; a damage that is not to fail the shard comes last, as a BadEntry."""
        file: InputFile = job.arguments["file"]
        read, limit = 0, job.arguments.get("limit")
        try:
            for sample in itertools.islice(read_samples(file.folder(self.config.options), file.base), limit):
                read += 1
                yield sample
        except ShardError as error:
            if self.config.on_truncated == "fail" or read == 0:
                _refuse(file, read, self.config, error)
            yield BadEntry("truncated_tar", f"{file.name}: cut short or damaged after {read:,} samples")

    def _parse(self, members: dict[str, bytes]) -> tuple[bytes | None, str | None, dict[str, Any]]:
        """Image, caption and fields of the json. Raises BadEntry for text that is none."""
        images = (members[name] for name in sorted(members) if f".{name}".lower().endswith(IMAGE_ENDINGS))
        metadata = _parse_json(members.get("json", b"{}"))
        if self.config.caption_field is None:
            try:
                caption = members["txt"].decode() if "txt" in members else None
            except UnicodeDecodeError as error:
                raise BadEntry("undecodable_caption", str(error)) from error
        else:
            caption = metadata.get(self.config.caption_field)
            if not isinstance(caption, str | None):
                raise BadEntry("no_caption", f"json field {self.config.caption_field!r} is no text")
        return next(images, None), caption, {k: v for k, v in metadata.items() if k not in OWN_FIELDS}


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadEntry("undecodable_metadata", str(error)) from error
    if not isinstance(metadata, dict):
        raise BadEntry("undecodable_metadata", f"a JSON {type(metadata).__name__}, an object is expected")
    return metadata


def _refuse(file: InputFile, read: int, config: TarsConfig, error: ShardError) -> NoReturn:
    if isinstance(error.__cause__, FileNotFoundError):
        raise ShardError(f"{file.url}: was there when the tars were listed, is gone; run again") from error
    advice = "replace it"
    if read and config.on_truncated == "fail":
        advice += ", or set source.on_truncated=keep to take the samples before the damage"
    raise ShardError(
        f"{file.url}: not a tar, or cut short or damaged, after {read:,} samples of its {file.size:,} bytes; "
        f"{advice}"
    ) from error
