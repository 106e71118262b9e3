"""WebDataset tars (an image and txt or json for each key, the layout of BLIP-3o) -> raw image-text shards,
one for each.

Every member of the input is part of a sample, or of a counted drop, or is counted itself.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn, Self

from pydantic import model_validator

from pipelines.dag import Place, ShardStage
from pipelines.lists.captions import SeveralCaptions, read_caption
from pipelines.lists.values import BadEntry
from pipelines.runtime.pool import ShardJob
from pipelines.shards.archive import Archive, Group, KeyEnd, Missing
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, shard_name
from pipelines.shards.tars import TarSamples, tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import InputFile, find_inputs
from pipelines.sources.raw_samples import (
    IMAGE_ENDINGS,
    OWN_FIELDS,
    SampleMaker,
    SourceImages,
    picture_endings,
    picture_packages,
    sample_maker,
    source_image_fields,
)
from repfusion.config import Config
from repfusion.tars import TarError

POSITION_DIGITS = 6
NUM_COUNTED_TARS = 8
NUM_COUNTED_SAMPLES = 500
"""How much is read to estimate the samples in all tars: the first so many of so many tars."""


CAPTION_EXTENSIONS = ("txt", "caption")
"""Members that hold the caption; the first of them counts."""
ENDINGS = (".tar", ".tar.gz", ".tgz")
UNREAD_ENDINGS = (
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
    ".zip",
    ".7z",
    ".rar",
)
"""Archives that are named in an error, rather than passed over, where they lie beside those that are read."""


class TarsConfig(Config):
    """WebDataset tars to take in, each of which becomes a shard."""

    kind: Literal["tars"] = "tars"
    path: str
    """A .tar, .tar.gz or .tgz file, a folder of them or a pattern such as `data/*/*.tar` or
    `data/{000..127}.tar`; local or any fsspec URL. Shards are numbered in the order of the names.
    """
    caption_field: str | None = None
    """Field of each sample's json that holds the caption; None takes the txt member or, where there is none,
    the caption member.
    """
    several_captions: SeveralCaptions = "whole"
    """What a caption of several lines, or a list of captions, means: `whole` is one caption, and drops
    lists; `first` takes the first; `all` takes it too and keeps all as `all_captions` in the sample's json,
    for a captions column to draw from.
    """
    image_extension: str | None = None
    """Extension of the member that is the image, such as `left.png`, where samples have several; None takes
    the one without a further dot, or the only one.
    """
    images: SourceImages = ()
    """Members that hold the source pictures of editing samples, by their extensions without the format, in
    the order in which the caption counts them: `[source]` for `KEY.source.png` beside `KEY.png`.
    """
    key_ends: KeyEnd = "first_dot"
    """Where in a file's name the key ends and the extension begins; WebDataset's rule is the first dot."""
    on_truncated: Literal["fail", "keep"] = "fail"
    """What to do with a tar that is cut short, or damaged from some byte on: fail its shard, or keep the
    samples before the damage and count one drop, `truncated_tar`. Changes no bytes of other shards.
    """
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""

    @model_validator(mode="after")
    def _sources_have_their_key(self) -> Self:
        if self.images and self.key_ends == "last_dot":
            raise ValueError(
                f"images {list(self.images)} with key_ends last_dot, by which KEY.{self.images[0]}.png is of "
                "another key than KEY.png; leave key_ends at first_dot"
            )
        return self


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
    names = {"kind", "caption_field", "several_captions", "image_extension", "key_ends"}
    own = {f"source.{name}": value for name, value in config.model_dump(mode="json", include=names).items()}
    return {**own, **source_image_fields(config.images), **image_fields(ingest)}


def find_tars(config: TarsConfig) -> tuple[InputFile, ...]:
    """Raises ValueError where there is none, or an archive that is not read."""
    found = find_inputs(config.path, ENDINGS + UNREAD_ENDINGS, "source.path", config.options)
    if unread := [file.url for file in found if file.name.lower().endswith(UNREAD_ENDINGS)]:
        raise ValueError(
            f"source.path: {unread[0]} ({len(unread)} such archives of {len(found)}) is not read; expected "
            f"{', '.join(ENDINGS)}: unpack it, or choose the others by a pattern"
        )
    return found


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
        try:
            with _archive(file, config, max_bytes=0) as archive:
                for group in itertools.islice(archive.groups(), NUM_COUNTED_SAMPLES):
                    samples += 1
                    num_bytes += group.num_bytes
        except (TarError, FileNotFoundError):
            continue  # the worker says what is wrong with it
    return round(samples / max(1, num_bytes) * sum(file.size for file in tars))


def probe_jobs(config: TarsConfig, wanted: int, offset: int = 0) -> tuple[ShardJob, ...]:
    """Jobs that read about `wanted` samples, the first ones of tars spread evenly."""
    chosen = _spread(find_tars(config), min(wanted, NUM_COUNTED_TARS), offset)
    return tuple(_job(index, file, limit=-(-wanted // len(chosen))) for index, file in chosen)


def _spread(tars: tuple[InputFile, ...], number: int, offset: int = 0) -> list[tuple[int, InputFile]]:
    step = max(1, len(tars) // number)
    return list(enumerate(tars))[offset % step :: step][:number]


def _archive(
    file: InputFile, config: TarsConfig, max_bytes: int, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> Archive:
    """A tar whose members of these endings, captions and metadata are read."""
    is_read = partial(_is_read, endings=endings)
    return Archive(file.folder(config.options), file.base, config.key_ends, is_read, max_bytes)


def _is_read(extension: str, endings: tuple[str, ...]) -> bool:
    is_text = extension.rpartition(".")[2] in (*CAPTION_EXTENSIONS, "json")
    return is_text or f".{extension}".endswith(endings)


class TarWorker:
    """Makes `NAME.tar` from one foreign tar.

    A key is the number of the tar and the position in it; the original one is `source_key` in the json,
    beside `source_file`. The fields of the sample's own json stay, but for those that are ours.

    Reasons of drops: no_image, several_images, no_caption, undecodable_caption, not_text, several_captions,
    undecodable_metadata, duplicate_key, dotted_key, too_many_bytes, broken_link, unreadable_member,
    truncated_tar, missing_source, broken_source, and those of ImageFitter, of clips those of BadClip. Members
    that belong to no sample are counted beside them: extra_image, unused_member, hidden_file, no_extension,
    metadata_file.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: TarsConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._make = SampleMaker(ingest)
        self._endings, self._packages = picture_endings(ingest), picture_packages(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, self._packages) as commit:
            with tar_shard(commit) as samples, sample_maker(self._make, job.careful_sec) as make:
                self._copy(job, commit, samples, make)
            commit.check_drops(self.ingest.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _copy(
        self,
        job: ShardJob,
        commit: ShardCommit,
        samples: TarSamples,
        make: Callable[..., dict[str, bytes]],
    ) -> None:
        file: InputFile = job.arguments["file"]
        seen: set[str] = set()
        prefix = f"{job.arguments['index']:05d}"
        for position, entry in enumerate(self._entries(job, commit)):
            if position == 10**POSITION_DIGITS:
                raise ShardError(f"{file.url}: more than {position:,} samples; split the tar")
            key = f"{prefix}{position:0{POSITION_DIGITS}d}"
            if isinstance(entry, BadEntry):
                commit.drop(key, entry.reason, entry.detail)
                continue
            try:
                if entry.key in seen:
                    raise BadEntry("duplicate_key", "the tar has this key before")
                used, image, caption, metadata = self._parse(entry)
                pictures, sources = self._sources(entry)
                metadata |= {"source_key": entry.key, "source_file": file.name}
                made = make(key, image, caption, metadata, sources)
            except BadEntry as error:
                commit.drop(key, error.reason, f"{entry.key}: {error.detail}")
            else:
                samples.write(key, made)
                for extension in sorted(entry.members.keys() - used - pictures):
                    reason = "extra_image" if self._is_image(extension) else "unused_member"
                    commit.drop(key, reason, f"{entry.key}.{extension}")
            seen.add(entry.key)

    def _entries(self, job: ShardJob, commit: ShardCommit) -> Iterator[Group | BadEntry]:
        """The tar's samples, or why something is none; a damage that is not to fail the shard comes last."""
        file: InputFile = job.arguments["file"]
        read, limit = 0, job.arguments.get("limit")
        with _archive(file, self.config, self.ingest.max_download_bytes, self._endings) as archive:
            try:
                for group in itertools.islice(archive.groups(), limit):
                    read += 1
                    yield from _undotted(group, self._endings)
            except FileNotFoundError as error:
                raise ShardError(
                    f"{file.url}: was there when the tars were listed, is gone; run again"
                ) from error
            except TarError as error:
                if self.config.on_truncated == "fail" or read == 0:
                    _refuse(file, read, self.config, error)
                yield BadEntry("truncated_tar", f"{file.name}: cut short or damaged after {read:,} samples")
            for reason, name in archive.strays:
                commit.drop(f"{job.arguments['index']:05d}", reason, name)

    def _parse(self, group: Group) -> tuple[set[str], bytes | None, str | None, dict[str, Any]]:
        """Which members are used; image, caption and fields of the json. Raises BadEntry."""
        image = self._image(group)
        text = next((one for one in CAPTION_EXTENSIONS if one in group.members), "")
        used = {extension for extension in (image, text, "json") if extension in group.members}
        data = {extension: _held(group.members[extension]) for extension in used}
        metadata = _parse_json(data.get("json", b"{}"))
        field = self.config.caption_field
        caption, kept = read_caption(
            data.get(text) if field is None else metadata.get(field), self.config.several_captions
        )
        fields = {name: value for name, value in metadata.items() if name not in OWN_FIELDS}
        return used, data.get(image), caption, fields | kept

    def _is_image(self, extension: str) -> bool:
        """Whether a member is a picture by its name: an image or, where clips are made, a clip."""
        return f".{extension}".endswith(self._endings)

    @property
    def _stems(self) -> list[str]:
        """Extensions of source pictures, without the format, as groups spell them."""
        return [name.lower() for name in self.config.images]

    def _sources(self, group: Group) -> tuple[set[str], list[bytes | None]]:
        """Which members are source pictures, and their bytes; None for one that is not there. Raises
        BadEntry.
        """
        used: set[str] = set()
        sources: list[bytes | None] = []
        for stem in self._stems:
            found = [one for one in group.members if self._is_image(one) and one.rpartition(".")[0] == stem]
            if len(found) > 1:
                raise BadEntry("several_images", f"{', '.join(sorted(found))}: source images of one name")
            used |= set(found)
            sources += [_source_bytes(one, group.members[one]) for one in found] or [None]
        return used, sources

    def _image(self, group: Group) -> str:
        """Extension of the member that is the image; empty where there is none."""
        if self.config.image_extension is not None:
            return self.config.image_extension.lower()
        images = sorted(
            extension
            for extension in group.members
            if self._is_image(extension) and extension.rpartition(".")[0] not in self._stems
        )
        if plain := [extension for extension in images if "." not in extension]:
            return plain[0]
        if len(images) > 1:
            raise BadEntry(
                "several_images", f"{', '.join(images)}: say which by source.image_extension={images[0]}"
            )
        return images[0] if images else ""


def _source_bytes(extension: str, found: bytes | Missing | None) -> bytes:
    if isinstance(found, Missing):
        raise BadEntry("broken_source", f"{extension}: {found.reason}: {found.detail}")
    assert found is not None
    return found


def _undotted(group: Group, endings: tuple[str, ...]) -> Iterator[Group | BadEntry]:
    """The group; where none of its members has a plain extension, what was probably meant by each dotted one:
    `shot.001.png` and `shot.002.png` are one sample `shot` to WebDataset.
    """
    read = [extension for extension in group.members if _is_read(extension, endings)]
    stems = dict.fromkeys(extension.rpartition(".")[0] for extension in read)
    if "" in stems or len(read) < 2:
        yield group
        return
    for stem in stems:
        yield BadEntry(
            "dotted_key",
            f"{group.key}.{stem}: WebDataset's keys end at the first dot, which makes one sample of all "
            f"{group.key}.*; set source.key_ends=last_dot",
        )


def _held(found: bytes | Missing | None) -> bytes:
    if isinstance(found, Missing):
        raise BadEntry(found.reason, found.detail)
    assert found is not None
    return found


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadEntry("undecodable_metadata", str(error)) from error
    if not isinstance(metadata, dict):
        raise BadEntry("undecodable_metadata", f"a JSON {type(metadata).__name__}, an object is expected")
    return metadata


def _refuse(file: InputFile, read: int, config: TarsConfig, error: TarError) -> NoReturn:
    advice = "replace it"
    if read and config.on_truncated == "fail":
        advice += ", or set source.on_truncated=keep to take the samples before the damage"
    raise ShardError(
        f"{file.url}: not a tar, or cut short or damaged, after {read:,} samples of its {file.size:,} bytes "
        f"({error}); {advice}"
    ) from error
