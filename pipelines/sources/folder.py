"""A folder of image files with captions beside them or in a csv -> raw image-text shards.

Every image, and every caption without one, ends as a sample or as a counted drop. The folder is walked in the
order of its paths, one folder's listing in memory at a time.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, sample_key, shard_name
from pipelines.shards.tars import tar_shard
from pipelines.sources.base import Entries, read_stage
from pipelines.sources.ingest import IngestConfig, image_fields
from pipelines.sources.inputs import list_folder
from pipelines.sources.raw_samples import (
    IMAGE_ENDINGS,
    OWN_FIELDS,
    PACKAGES,
    BadEntry,
    SampleMaker,
    free_names,
    printable,
    sample_maker,
)
from repfusion.config import Config
from repfusion.files import digest_of

CAPTION_ENDING = ".txt"
FAULTS = {
    "broken_link": "a link that leads nowhere",
    "link_out": "a link that leads out of the folder; copy what it leads to",
    "link_to_folder": "a link to a folder, whose files count where they lie",
    "not_a_file": "neither a file nor a folder",
}
"""What is said of entries that are no regular files."""


class FolderConfig(Config):
    """Image files to take in."""

    kind: Literal["folder"] = "folder"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    path: str
    """The folder; local or any fsspec URL. Folders in it count, hidden files do not."""
    captions: str | None = None
    """A csv of captions, such as the `metadata.csv` of a Hugging Face image folder; each worker holds it in
    memory. None takes those in a .txt file beside each image, of the same name.
    """
    file_column: str = "file_name"
    """The csv's column of image files, as paths within the folder."""
    caption_column: str = "caption"
    """The csv's column of captions."""
    extra_columns: Annotated[tuple[str, ...], free_names(OWN_FIELDS)] = ()
    """Further columns of the csv that go into each sample's json, as text, such as alternative captions."""
    options: dict[str, Any] = {}
    """Options of the fsspec file system: an endpoint, a profile. Changes no bytes."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A line of the csv, or a caption file that is still to be read."""

    path: str
    version: str
    """Another one means another text."""
    text: str | None = None
    """None where the file is still to be read, or the csv has none."""
    extra: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """An image and its caption, or what there is of them."""

    path: str
    """Path of the image, or of the caption that has none."""
    image: str | None
    """Version of the image; None where there is no such file."""
    caption: Caption | None
    is_repeated: bool = False
    """Whether the csv names the image a second time."""
    fault: str = ""
    """Why the image or its caption cannot be read, as a reason of drops."""

    @property
    def identity(self) -> str:
        return f"{self.path}\t{self.image}\t{self.caption.version if self.caption else None}\n"


@dataclass(frozen=True)
class FolderSource:
    """A folder of images, read by `ingest`."""

    config: FolderConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        fields = fingerprint_fields(self.config, ingest)
        return [read_stage(FolderWorker, self.config, fields, jobs(self.config), ingest, place)]

    def entries(self) -> Entries:
        names = [job.name for job in jobs(self.config)]
        return Entries(num_entries(self.config), names, partial(probe_jobs, self.config))


def fingerprint_fields(config: FolderConfig, ingest: IngestConfig) -> dict[str, Any]:
    """What decides the bytes, beside the files themselves."""
    fields: dict[str, Any] = {
        "source.kind": config.kind,
        "source.shard_size": config.shard_size,
        "source.captions": "txt" if config.captions is None else "csv",
    }
    if config.captions is not None:
        fields["source.extra_columns"] = list(config.extra_columns)
    return {**fields, **image_fields(ingest)}


def jobs(config: FolderConfig) -> tuple[ShardJob, ...]:
    """Shards of `source.shard_size` entries. Walks the folder; what is kept of it is a hash for each shard.

    Raises:
        ValueError: where there is no folder or no image in it, or no csv that has the columns.
    """
    entries = FolderEntries(config).walk()
    made: list[ShardJob] = []
    while shard := _Shard.of(islice(entries, config.shard_size)):
        start = len(made) * config.shard_size
        arguments = {"start": start, "stop": start + shard.number, "first": shard.first}
        made.append(ShardJob(shard_name(len(made)), "", {"files": shard.digest}, arguments))
    if not made:
        raise ValueError(f"source.path: {config.path} holds no images ({' '.join(IMAGE_ENDINGS)})")
    return tuple(made)


def num_entries(config: FolderConfig) -> int:
    """Images, and captions without one; raises what `jobs` raises."""
    return sum(1 for _ in FolderEntries(config).walk())


def probe_jobs(config: FolderConfig, wanted: int, offset: int = 0) -> tuple[ShardJob, ...]:
    """A job that reads about `wanted` entries, spread evenly."""
    total = num_entries(config)
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


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _order(path: str) -> str:
    """Sorts paths folder by folder, as a walk meets them."""
    return path.replace("/", "\0")


class FolderEntries:
    """What a folder holds, in the order of the paths.

    Raises:
        ValueError: where there is no folder, or no csv that has the columns.
    """

    def __init__(self, config: FolderConfig):
        self.config = config
        self.folder = Folder(config.path.rstrip("/").removeprefix("file://"), config.options)
        self._captions = None if config.captions is None else _Captions(config)

    def walk(self, first: str = "") -> Iterator[Entry]:
        """Entries, from that of a given path on."""
        try:
            if self._captions is None:
                yield from self._walk(self.folder, "", first.split("/"))
            else:
                yield from self._join(
                    self._walk(self.folder, "", first.split("/")), self._captions.walk(first)
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
        stems = {name.rpartition(".")[0] for name in files if _is_image(name)}
        for entry in listed:
            if entry.name < first[0]:
                continue
            path = prefix + entry.name
            if entry.is_folder and not entry.fault:
                inside = first[1:] if entry.name == first[0] else []
                yield from self._walk(folder / entry.name, f"{path}/", inside or [""])
            elif entry.is_folder:
                yield Entry(path, None, None, fault=entry.fault)
            elif _is_image(entry.name):
                text = f"{entry.name.rpartition('.')[0]}{CAPTION_ENDING}"
                caption = Caption(prefix + text, files[text]) if text in files else None
                fault = entry.fault or (faults[text] if caption and self._captions is None else "")
                yield Entry(path, files[entry.name], caption, fault=fault)
            elif self._captions is None and entry.name.endswith(CAPTION_ENDING):
                if entry.name.removesuffix(CAPTION_ENDING) not in stems:
                    yield Entry(path, None, Caption(path, files[entry.name]), fault=entry.fault)
            elif entry.fault == "broken_link":
                yield Entry(path, None, None, fault=entry.fault)  # perhaps to a folder that is not mounted

    @staticmethod
    def _join(images: Iterator[Entry], captions: Iterator[Caption]) -> Iterator[Entry]:
        """Merges files and lines of the csv, both in the order of their paths."""
        ahead = next(images, None)
        last = None
        for caption in captions:
            while ahead is not None and _order(ahead.path) < _order(caption.path):
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


class _Captions:
    """The csv, in memory as Arrow columns, in the order of its paths.

    Raises:
        ValueError: where it is missing, not readable or lacks a column.
    """

    def __init__(self, config: FolderConfig):
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import csv

        assert config.captions is not None
        self._extra = config.extra_columns
        place = config.captions.removeprefix("file://")
        parent, _, name = place.rpartition("/")
        columns = [config.file_column, config.caption_column, *config.extra_columns]
        try:
            with Folder(parent or ".", config.options).open(name) as stream:
                table = csv.read_csv(
                    stream,
                    parse_options=csv.ParseOptions(newlines_in_values=True),
                    convert_options=csv.ConvertOptions(
                        column_types=dict.fromkeys(columns, pa.large_string())
                    ),
                )
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise ValueError(f"source.captions: {place} is not readable as csv: {error}") from error
        for column in columns:
            if column not in table.column_names:
                raise ValueError(
                    f"source.captions: {place} has no column {column!r}; it has {table.column_names}"
                )
        paths = pc.replace_substring_regex(table[config.file_column].fill_null(""), r"^\./", "")
        order = pc.sort_indices(pc.replace_substring(paths, "/", "\0"))
        columns = [paths, *(table[column] for column in columns[1:])]
        self._table = (
            pa.table(columns, names=list(map(str, range(len(columns))))).take(order).combine_chunks()
        )

    def walk(self, first: str) -> Iterator[Caption]:
        """Lines from a path on."""
        paths = self._table[0]
        start = bisect_left(range(len(paths)), _order(first), key=lambda index: _order(paths[index].as_py()))
        for batch in self._table.slice(start).to_batches(max_chunksize=1000):
            for path, text, *extra in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                named = dict(zip(self._extra, extra, strict=True))
                version = digest_of([text, named])
                yield Caption(path, version, text, named)


class FolderWorker:
    """Makes `NAME.tar` from image files. A key is the entry's position in the folder; the json says its
    `source_file`.

    Reasons of drops: no_image (a caption file without an image), not_on_disk (the csv names it), repeated_row
    (the csv names it again), no_caption (no file beside it, or no text in the csv), not_in_csv,
    undecodable_caption, too_many_bytes, not_readable, those of `FAULTS` and those of ImageFitter.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, config: FolderConfig, ingest: IngestConfig):
        self.folder, self.config, self.ingest = folder, config, ingest
        self._entries = FolderEntries(config)
        self._make = SampleMaker(ingest)

    def __call__(self, job: ShardJob) -> Sidecar:
        wanted = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow", *PACKAGES)
        ) as commit:
            with tar_shard(commit) as samples, sample_maker(self._make, job.careful_sec) as make:
                for position, entry in zip(wanted, self._wanted(job, wanted), strict=False):
                    key = sample_key(position)
                    try:
                        members = make(key, *self._read(entry))
                    except BadEntry as error:
                        commit.drop(key, error.reason, f"{printable(entry.path)}: {error.detail}")
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

    def _read(self, entry: Entry) -> tuple[bytes | None, str | None, dict[str, Any]]:
        """Image, caption and metadata. Raises BadEntry."""
        uses_csv = self.config.captions is not None
        if entry.is_repeated:
            raise BadEntry("repeated_row", "the csv names it before")
        if entry.fault:
            raise BadEntry(entry.fault, FAULTS[entry.fault])
        if entry.image is None:
            detail = "named in the csv, not on disk" if uses_csv else "a caption without an image"
            raise BadEntry("not_on_disk" if uses_csv else "no_image", detail)
        if entry.caption is None:
            detail = "on disk, not in the csv" if uses_csv else f"no {CAPTION_ENDING} file beside it"
            raise BadEntry("not_in_csv" if uses_csv else "no_caption", detail)
        caption = entry.caption.text
        if not uses_csv:
            try:
                caption = self._bytes(entry.caption.path).decode()
            except UnicodeDecodeError as error:
                raise BadEntry("undecodable_caption", str(error)) from error
        metadata = {**(entry.caption.extra or {}), "source_file": entry.path}
        return self._bytes(entry.path), caption, metadata

    def _bytes(self, path: str) -> bytes:
        """A file's bytes. Raises BadEntry where they are too many, or not ours to read."""
        limit = self.ingest.max_download_bytes
        try:
            with self._entries.folder.open(path) as stream:
                data = stream.read(limit + 1)
        except PermissionError as error:
            raise BadEntry("not_readable", str(error)) from error
        if len(data) > limit:
            raise BadEntry("too_many_bytes", f"more than {limit:,} bytes")
        return data
