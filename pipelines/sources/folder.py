"""A folder of image files with captions beside them or in a list -> raw image-text shards.

Every image, and every caption without one, ends as a sample or as a counted drop. The folder is walked in the
order of its paths, one folder's listing in memory at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.lists.by_path import ListedCaption, PathList, order, spellings
from pipelines.lists.captions import ALL_CAPTIONS, SeveralCaptions, read_caption
from pipelines.lists.tables import CsvFormat
from pipelines.lists.values import BadEntry
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, sample_key, shard_name
from pipelines.shards.tars import tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import Listed, list_folder
from pipelines.sources.raw_samples import (
    IMAGE_ENDINGS,
    OWN_FIELDS,
    SampleMaker,
    SourceImages,
    free_names,
    picture_endings,
    picture_packages,
    sample_maker,
    source_image_fields,
)
from repfusion.config import Config

CAPTION_ENDINGS = (".txt", ".caption")
"""What counts as a caption by its name, in small letters or capitals; what comes first counts before the
others.
"""
LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Lists of captions that are taken where they lie in the folder."""
FAULTS = {
    "broken_link": "a link that leads nowhere",
    "link_out": "a link that leads out of the folder; copy what it leads to",
    "link_to_folder": "a link to a folder, whose files count where they lie",
    "not_a_file": "neither a file nor a folder",
    "two_of_a_name": "two images that differ in the ending alone",
}
"""What is said of entries that are no regular files, and of source pictures."""
BESIDE = "beside"
"""Stands for captions in files beside the images."""


class FolderConfig(Config):
    """Image files to take in."""

    kind: Literal["folder"] = "folder"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """The folder; local or any fsspec URL. Folders in it count, hidden files do not."""
    captions: str | None = None
    """A list of captions (.csv, .tsv, .jsonl, .json, .parquet), which each worker holds in memory. None takes
    the `metadata.csv`, `.jsonl` or `.parquet` of a Hugging Face image folder where it has one, else what
    `beside` takes: a file beside each image, `a.png.txt`, `a.png.caption`, `a.txt` or `a.caption` for
    `a.png`, the first of these that there is.
    """
    file_column: str = "file_name"
    """The list's column of image files: paths within the folder, with / or \\, or absolute ones."""
    caption_column: str | None = None
    """The list's column of captions; None is `caption` or, where there is none, `text`."""
    several_captions: SeveralCaptions = "whole"
    """What a caption of several lines, or a list of captions, means: `whole` is one caption, and refuses
    lists; `first` takes the first; `all` takes it too and keeps all as `all_captions` in the sample's json,
    for a captions column to draw from.
    """
    images: SourceImages = ()
    """Files that hold the source pictures of editing samples, by what their names have before the ending, in
    the order in which the caption counts them: `[source]` for `a.source.png` beside `a.png`.
    """
    extra_columns: Annotated[tuple[str, ...], free_names(OWN_FIELDS | {ALL_CAPTIONS})] = ()
    """Further columns of the list that go into each sample's json, such as alternative captions; those of a
    csv as text.
    """
    csv: CsvFormat = CsvFormat()
    """How csv and tsv lists are written."""
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption file that is still to be read."""

    path: str
    version: str
    """Another one means another text."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source picture that is still to be read."""

    path: str
    version: str
    """Another one means other bytes."""
    fault: str = ""
    """Why it cannot be read, as a key of FAULTS."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image and its caption, or what there is of them."""

    path: str
    """Path of the image, or of the caption that has none."""
    image: str | None
    """Version of the image; None where there is no such file."""
    caption: Caption | ListedCaption | None
    is_repeated: bool = False
    """Whether the list names the image a second time."""
    fault: str = ""
    """Why the image or its caption cannot be read, as a reason of drops."""
    sources: tuple[SourceFile | None, ...] = ()
    """Source pictures; None for one that is not there."""

    @property
    def identity(self) -> str:
        beside = "".join(f"\t{one and (one.path, one.version)}" for one in self.sources)
        return f"{self.path}\t{self.image}\t{self.caption.version if self.caption else None}{beside}\n"


@dataclass(frozen=True)
class FolderSource:
    """A folder of images, or of clips, read by `ingest`."""

    config: FolderConfig
    endings: tuple[str, ...] = IMAGE_ENDINGS
    """What counts as an image, or as a clip, by its name."""

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields, listed = fingerprint_fields(self.config, ingest), jobs(self.config, self.endings)
        return [read_stage(FolderWorker, self.config, fields, listed, ingest, place)]

    def entries(self) -> Entries:
        names = [job.name for job in jobs(self.config, self.endings)]
        probe = partial(probe_jobs, self.config, endings=self.endings)
        return Entries(num_entries(self.config, self.endings), names, probe)


def fingerprint_fields(config: FolderConfig, ingest: IngestConfig) -> dict[str, Any]:
    """What decides the bytes, beside the files themselves."""
    fields: dict[str, Any] = {
        "source.kind": config.kind,
        "source.shard_size": config.shard_size,
        "source.several_captions": config.several_captions,
        "source.captions": BESIDE,
    }
    if find_list(config) is not None:
        # which columns are read is in the identity of each line
        fields |= {"source.captions": "list", "source.extra_columns": list(config.extra_columns)}
    return {**fields, **source_image_fields(config.images), **image_fields(ingest)}


def find_list(config: FolderConfig) -> str | None:
    """The list of captions: the one that is asked for, or the one in the folder; None where captions lie
    beside the images.

    Raises:
        ValueError: where the folder has several.
    """
    if config.captions is not None:
        return None if config.captions == BESIDE else config.captions.removeprefix("file://")
    folder = folder_of(config)
    found = [name for name in LISTS if folder.has(name)]
    if len(found) > 1:
        raise ValueError(
            f"source.captions: {folder} has {' and '.join(found)}; name one of them, or '{BESIDE}' for files "
            "beside the images"
        )
    return str(folder / found[0]) if found else None


def folder_of(config: FolderConfig) -> Folder:
    return Folder(config.path.rstrip("/").removeprefix("file://"), config.options)


def jobs(config: FolderConfig, endings: tuple[str, ...] = IMAGE_ENDINGS) -> tuple[ShardJob, ...]:
    """Shards of `source.shard_size` entries. Walks the folder; what is kept of it is a hash for each shard.

    Raises:
        ValueError: where there is no folder or no image in it, or no list that has the columns.
    """
    entries = FolderEntries(config, endings).walk()
    made: list[ShardJob] = []
    while shard := _Shard.of(islice(entries, config.shard_size)):
        start = len(made) * config.shard_size
        arguments = {"start": start, "stop": start + shard.number, "first": shard.first}
        made.append(ShardJob(shard_name(len(made)), "", {"files": shard.digest}, arguments))
    if not made:
        wanted = "images" if endings == IMAGE_ENDINGS else "clips"
        raise ValueError(f"source.path: {config.path} holds no {wanted} ({' '.join(endings)})")
    return tuple(made)


def num_entries(config: FolderConfig, endings: tuple[str, ...] = IMAGE_ENDINGS) -> int:
    """Images, and captions without one; raises what `jobs` raises."""
    return sum(1 for _ in FolderEntries(config, endings).walk())


def probe_jobs(
    config: FolderConfig, wanted: int, offset: int = 0, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> tuple[ShardJob, ...]:
    """A job that reads about `wanted` entries, spread evenly."""
    total = num_entries(config, endings)
    step = max(1, total // wanted)
    return (ShardJob(shard_name(0), "", {}, {"start": offset % step, "stop": total, "step": step}),)


@dataclass(frozen=True)
class _Shard:
    first: str
    number: int
    digest: str

    @classmethod
    def of(cls, entries: Iterator[Entry]) -> "_Shard | None":
        digest, number, first = hashlib.sha256(), 0, None
        for entry in entries:
            first = entry.path if first is None else first
            number += 1
            digest.update(entry.identity.encode(errors="surrogateescape"))
        return None if first is None else cls(first, number, digest.hexdigest())


class _CaptionFiles:
    """The caption files that lie directly in a folder."""

    def __init__(self, names: Sequence[str]):
        self._names: dict[str, str] = {}
        """Name without its ending -> the file that counts."""
        for ending in CAPTION_ENDINGS:
            found = [name for name in names if name.lower().endswith(ending)]
            # small letters before capitals
            for name in sorted(found, key=lambda name: (not name.endswith(ending), name)):
                self._names.setdefault(name[: -len(ending)], name)

    def of(self, image: str) -> str | None:
        """The caption file of an image: `a.png.txt` before `a.txt`."""
        return self._names.get(image) or self._names.get(_stem(image))

    @staticmethod
    def stem(name: str) -> str | None:
        """The name of a caption file without its ending; None for any other file."""
        ending = next((ending for ending in CAPTION_ENDINGS if name.lower().endswith(ending)), None)
        return None if ending is None else name[: -len(ending)]


class _SourceFiles:
    """The source pictures that lie directly in a folder, each beside its target."""

    def __init__(self, listed: Sequence[Listed], names: Sequence[str], endings: tuple[str, ...]):
        self._names = names
        pictures = [one for one in listed if not one.is_folder and one.name.lower().endswith(endings)]
        targets = {_stem(one.name) for one in pictures if self._target(one.name) is None}
        self._files: dict[str, list[Listed]] = {}
        """Files by their names without the ending."""
        for one in pictures:
            if self._target(one.name) in targets:
                self._files.setdefault(_stem(one.name), []).append(one)

    def _target(self, file: str) -> str | None:
        """Whose source picture a file is by its name, without the ending; None for another file."""
        ends = [f".{name}" for name in self._names if _stem(file).endswith(f".{name}")]
        return _stem(file).removesuffix(ends[0]) if ends else None

    def has(self, file: str) -> bool:
        """Whether a file is the source picture of a target that is there."""
        return _stem(file) in self._files

    def of(self, image: str, prefix: str) -> tuple[SourceFile | None, ...]:
        """The source pictures of an image, their paths after a prefix."""
        return tuple(self._picture(f"{_stem(image)}.{name}", prefix) for name in self._names)

    def _picture(self, stem: str, prefix: str) -> SourceFile | None:
        if (files := self._files.get(stem)) is None:
            return None
        fault = files[0].fault or ("two_of_a_name" if len(files) > 1 else "")
        return SourceFile(prefix + files[0].name, f"{files[0].size}:{files[0].stamp}", fault)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


class FolderEntries:
    """What a folder holds, in the order of the paths; `endings` are those of its images, or of its clips.

    Raises:
        ValueError: where there is no folder, or no list that has the columns.
    """

    def __init__(self, config: FolderConfig, endings: tuple[str, ...] = IMAGE_ENDINGS):
        self.config, self.endings = config, endings
        self.folder = folder_of(config)
        listed = find_list(config)
        self.captions = None if listed is None else _path_list(config, listed)
        """The list of captions, if there is one."""

    def walk(self, first: str = "") -> Iterator[Entry]:
        """Entries, from that of a given path on."""
        try:
            if self.captions is None:
                yield from self._walk(self.folder, "", first.split("/"))
            else:
                yield from self._join(
                    self._walk(self.folder, "", first.split("/")), self.captions.walk(first)
                )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ValueError(
                f"source.path: {self.config.path}: {error}; expected a folder of images"
            ) from error

    def _walk(self, folder: Folder, prefix: str, first: list[str]) -> Iterator[Entry]:
        """Entries below a folder, as the file names tell them; nothing before the path of parts `first`."""
        listed = list_folder(folder, self.folder)
        files = {entry.name: f"{entry.size}:{entry.stamp}" for entry in listed if not entry.is_folder}
        faults = {entry.name: entry.fault for entry in listed}
        captions = _CaptionFiles([] if self.captions else list(files))
        sources = _SourceFiles(listed, self.config.images, self.endings)
        images = {name for name in files if self._is_image(name)}
        images |= {_stem(name) for name in images}
        for entry in listed:
            if entry.name < first[0] or sources.has(entry.name):
                continue
            path = prefix + entry.name
            if entry.is_folder and not entry.fault:
                inside = first[1:] if entry.name == first[0] else []
                yield from self._walk(folder / entry.name, f"{path}/", inside or [""])
            elif entry.is_folder:
                yield Entry(path, None, None, fault=entry.fault)
            elif self._is_image(entry.name):
                text = captions.of(entry.name)
                caption = None if text is None else Caption(prefix + text, files[text])
                fault = entry.fault or ("" if text is None else faults[text])
                beside = sources.of(entry.name, prefix)
                yield Entry(path, files[entry.name], caption, fault=fault, sources=beside)
            elif self.captions is None and (stem := captions.stem(entry.name)) is not None:
                if stem not in images:
                    yield Entry(path, None, Caption(path, files[entry.name]), fault=entry.fault)
            elif entry.fault == "broken_link":
                yield Entry(path, None, None, fault=entry.fault)  # perhaps to a folder that is not mounted

    def _is_image(self, name: str) -> bool:
        return name.lower().endswith(self.endings)

    @staticmethod
    def _join(images: Iterator[Entry], captions: Iterator[ListedCaption]) -> Iterator[Entry]:
        """Merges files and lines of the list, both in the order of their paths."""
        ahead = next(images, None)
        last = None
        for caption in captions:
            while ahead is not None and order(ahead.path) < order(caption.path):
                yield replace(ahead, caption=None)
                ahead = next(images, None)
            if ahead is not None and ahead.path == caption.path:
                yield replace(ahead, caption=caption)
                ahead = next(images, None)
            else:
                yield Entry(caption.path, None, caption, is_repeated=caption.path == last)
            last = caption.path
        while ahead is not None:
            yield replace(ahead, caption=None)
            ahead = next(images, None)


def _path_list(config: FolderConfig, url: str) -> PathList:
    return PathList(
        url,
        config.options,
        f"source.captions: {url}",
        roots=spellings(folder_of(config).url),
        file=config.file_column,
        caption=config.caption_column,
        extra=config.extra_columns,
        several=config.several_captions,
        csv=config.csv,
    )


class FolderWorker:
    """Makes `NAME.tar` from image files. A key is the entry's position in the folder; the json says its
    `source_file`.

    Reasons of drops: no_image (a caption file without an image), not_on_disk (the list names it),
    repeated_row (the list names it again), no_caption (no file beside it, or no text in the list),
    not_in_list, undecodable_caption, not_text, several_captions, undecodable_metadata, too_many_bytes,
    not_readable, missing_source, broken_source, those of `FAULTS` and those of ImageFitter, of clips those of
    BadClip.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: FolderConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._entries = FolderEntries(config, picture_endings(ingest))
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow", *picture_packages(self.ingest))
        ) as commit:
            with tar_shard(commit) as samples, sample_maker(self._make, job.careful_sec) as make:
                for position, entry in zip(wanted, self._wanted(job, wanted), strict=False):
                    key = sample_key(position)
                    try:
                        members = make(key, *self._read(entry))
                    except BadEntry as error:
                        commit.drop(key, error.reason, f"{entry.path}: {error.detail}")
                    else:
                        samples.write(key, members)
            commit.check_drops(self.ingest.max_drop_fraction)
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")

    def _wanted(self, job: ShardJob, wanted: range) -> list[Entry]:
        """Raises ShardError where the files are no longer those that the job was made for."""
        if (first := job.arguments.get("first")) is None:
            return list(islice(self._entries.walk(), wanted.start, wanted.stop, wanted.step))
        entries = list(islice(self._entries.walk(first), len(wanted)))
        found = _Shard.of(iter(entries))
        if found is None or found.digest != job.inputs["files"]:
            raise ShardError(
                f"shard {job.name}: the files in {self.config.path} from {first} on changed since they were "
                "listed; run again"
            )
        return entries

    def _read(self, entry: Entry) -> tuple[bytes | None, str | None, dict[str, Any], list[bytes | None]]:
        """Image, caption, metadata and source pictures. Raises BadEntry."""
        listed = self._entries.captions is not None
        if entry.is_repeated:
            raise BadEntry("repeated_row", "the list names it before")
        if entry.fault:
            raise BadEntry(entry.fault, FAULTS[entry.fault])
        if entry.image is None:
            detail = "named in the list, not on disk" if listed else "a caption without an image"
            raise BadEntry("not_on_disk" if listed else "no_image", detail)
        match entry.caption:
            case None:
                detail = "on disk, not in the list" if listed else "no caption file beside it"
                raise BadEntry("not_in_list" if listed else "no_caption", detail)
            case ListedCaption(problem=problem, text=text, fields=fields):
                if problem is not None:
                    raise BadEntry(*problem)
            case Caption(path=path, version=version):
                text, fields = read_caption(self._bytes(path, version), self.config.several_captions)
        image, fields = self._bytes(entry.path, entry.image), {**fields, "source_file": entry.path}
        return image, text, fields, [one and self._source(one) for one in entry.sources]

    def _source(self, picture: SourceFile) -> bytes:
        """A source picture's bytes. Raises BadEntry: broken_source."""
        if picture.fault:
            raise BadEntry("broken_source", f"{picture.path}: {picture.fault}: {FAULTS[picture.fault]}")
        try:
            return self._bytes(picture.path, picture.version)
        except BadEntry as error:
            raise BadEntry("broken_source", f"{picture.path}: {error.reason}: {error.detail}") from error

    def _bytes(self, path: str, version: str) -> bytes:
        """A file's bytes, in one request where it lies elsewhere. Raises BadEntry where they were too many
        when it was listed, or are not ours to read.
        """
        size, limit = int(version.partition(":")[0]), self.ingest.max_download_bytes
        if size > limit:
            raise BadEntry("too_many_bytes", f"{size:,} bytes, at most {limit:,}")
        try:
            return self._entries.folder.read(path)
        except PermissionError as error:
            raise BadEntry("not_readable", str(error)) from error
