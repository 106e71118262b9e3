"""Image shards -> a column of alternative captions (`KEY.long.txt` for the column `long`), from fields of the
samples' json or from tables. The images are not written again.

No sample is dropped: one that lacks a caption is listed in `NAME.missing.parquet` (key, caption, reason) and
has a member `KEY.missing.json`, so that the tar holds every key.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.sources.inputs import InputFile, find_inputs
from repfusion.config import Config, Strict
from repfusion.files import canonical_json, digest_of, json_bytes

if TYPE_CHECKING:
    import pyarrow as pa

COVERAGE = "coverage.json"
"""How many samples have each caption, and why the others lack it."""
MISSING_MEMBER = "missing.json"
BATCH_ROWS = 1 << 14


class CaptionConfig(Strict):
    """Where one alternative caption comes from: a field of each sample's json, or a table."""

    field: str | None = None
    """Field of the json, such as a further column of the source."""
    table: str | None = None
    """A .parquet file, a folder of them or a pattern; local or any fsspec URL. Sorted by its key column it is
    read a part at a time; else each shard reads all of it.
    """
    key_column: str = "key"
    """The table's column to find a sample by: text or whole numbers. Of rows with the same key, the first
    counts.
    """
    join_field: str | None = None
    """Field of the json that is compared with `key_column`, such as `url` or `source_key`; None takes the
    sample's key.
    """
    caption_column: str = "caption"
    """The table's column of captions."""
    max_chars: int | None = Field(default=None, ge=1)
    """A longer caption counts as lacking; None takes any. Choose it so that captions fit into the MLLM's
    context.
    """
    options: dict[str, Any] = {}
    """Options of the table's fsspec file system: an endpoint, a profile. Changes no bytes."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> "CaptionConfig":
        if (self.field is None) == (self.table is None):
            raise ValueError("give either field (of the json) or table (of captions)")
        if self.field is not None and (
            idle := self.model_fields_set & {"key_column", "join_field", "caption_column"}
        ):
            raise ValueError(
                f"{sorted(idle)} belong to a table, but the caption comes from the field {self.field!r}"
            )
        return self


class CaptionsConfig(Config):
    """A column of alternative captions, which trainings draw by `data.caption_weights`."""

    kind: Literal["captions"] = "captions"
    captions: dict[str, CaptionConfig] = Field(min_length=1)
    """The captions by name: `long` becomes the member `long.txt`."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that makes them. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return True

    @field_validator("captions")
    @classmethod
    def _names_are_plain(cls, captions: dict[str, CaptionConfig]) -> dict[str, CaptionConfig]:
        for name in captions:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"{name!r}: expected letters, digits, '_' or '-': it names the members")
        return captions


def fingerprint_fields(
    column: str, config: CaptionsConfig, identify: Callable[[str, Mapping[str, Any]], str]
) -> dict[str, Any]:
    """What decides the bytes of the column of a name; `identify` gives what changes with a file's content, by
    its URL and options. Raises ValueError where a table is missing.
    """
    fields: dict[str, Any] = {}
    for name, caption in sorted(config.captions.items()):
        prefix = f"columns.{column}.captions.{name}."
        fields[f"{prefix}max_chars"] = caption.max_chars
        if caption.table is None:
            fields[f"{prefix}field"] = caption.field
            continue
        for key in ("key_column", "join_field", "caption_column"):
            fields[prefix + key] = getattr(caption, key)
        files = table_files(name, caption)
        fields[f"{prefix}table"] = digest_of([identify(file.url, caption.options) for file in files])
    return fields


def table_files(name: str, column: CaptionConfig) -> tuple[InputFile, ...]:
    """Raises ValueError where there is none."""
    assert column.table is not None
    return find_inputs(column.table, (".parquet",), f"captions.{name}.table", column.options)


class _Table:
    """Captions by key, over all files of a table.

    Raises:
        ValueError: where a file is missing, not readable, or lacks a column or has one of an unfit type.
    """

    def __init__(self, name: str, column: CaptionConfig):
        self._name, self._column = name, column
        self._files = table_files(name, column)
        for file in self._files:
            with self._open(file) as stream:
                self._key_kind(stream, file)

    def _open(self, file: InputFile) -> Any:
        return file.folder(self._column.options).open(file.base)

    def _key_kind(self, stream: Any, file: InputFile) -> "pa.DataType":
        import pyarrow as pa
        import pyarrow.parquet as pq
        from pyarrow import types

        place = f"captions.{self._name}.table: {file.url}"
        try:
            schema = pq.read_schema(stream)
        except (pa.ArrowInvalid, EOFError) as error:
            raise ValueError(f"{place} is not readable as parquet: {error}") from error
        for column in (self._column.key_column, self._column.caption_column):
            if column not in schema.names:
                raise ValueError(f"{place} has no column {column!r}; it has {schema.names}")
            kind = schema.field(column).type
            is_key = column == self._column.key_column
            if not (
                types.is_string(kind) or types.is_large_string(kind) or (is_key and types.is_integer(kind))
            ):
                expected = "text or whole numbers" if is_key else "text"
                raise ValueError(f"{place}: column {column!r} is {kind}; expected {expected}")
        return schema.field(self._column.key_column).type

    def find(self, keys: set[str]) -> dict[str, str | None]:
        """The captions of those keys that the table has; row groups that can hold none are not read."""
        found: dict[str, str | None] = {}
        for file in self._files:
            with self._open(file) as stream:
                kind = self._key_kind(stream, file)
                for key, caption in self._rows(stream, _values(keys, kind), kind):
                    found.setdefault(str(key), caption)
        return found

    def _rows(self, stream: Any, wanted: list[Any], kind: "pa.DataType") -> Iterator[tuple[Any, str | None]]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if not wanted:
            return
        columns = [self._column.key_column, self._column.caption_column]
        parquet = pq.ParquetFile(stream)
        values = pa.array(wanted, kind)
        metadata = parquet.metadata
        # nested columns count several times, so that places differ from those among the names
        index = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == columns[0])
        groups = [
            group
            for group in range(parquet.num_row_groups)
            if _may_hold(metadata.row_group(group).column(index).statistics, wanted)
        ]
        for batch in parquet.iter_batches(
            BATCH_ROWS, row_groups=groups, columns=list(dict.fromkeys(columns))
        ):
            kept = batch.filter(pc.is_in(batch[columns[0]], value_set=values))
            yield from zip(kept[columns[0]].to_pylist(), kept[columns[1]].to_pylist(), strict=True)


def _values(keys: set[str], kind: "pa.DataType") -> list[Any]:
    """Keys in the type of the table's column, in order; those that have none there are left out."""
    from pyarrow import types

    if not types.is_integer(kind):
        return sorted(keys)
    bits = kind.bit_width
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if types.is_signed_integer(kind) else (0, 1 << bits)
    numbers = (int(key) for key in keys if re.fullmatch(r"-?(0|[1-9][0-9]*)", key))
    return sorted(number for number in numbers if low <= number < high)


def _may_hold(statistics: Any, wanted: list[Any]) -> bool:
    """Whether a row group may have one of the sorted values."""
    from bisect import bisect_left

    if statistics is None or not statistics.has_min_max or type(statistics.min) is not type(wanted[0]):
        return True
    first = bisect_left(wanted, statistics.min)
    return first < len(wanted) and wanted[first] <= statistics.max


class CaptionsWorker:
    """Makes `NAME.tar` of alternative captions.

    Reasons why a sample lacks one: no_field, not_text, empty, too_long, and of a table no_join_field, no_row.

    Args:
        folder: of the stage.
        source: folder of the image shards.
        config: the stage's.
    """

    concurrency: ClassVar[int] = 2

    def __init__(self, folder: Folder, source: Folder, config: CaptionsConfig):
        self.folder, self.source, self.config = folder, source, config
        self._tables = {
            name: _Table(name, one) for name, one in config.captions.items() if one.table is not None
        }

    def __call__(self, job: ShardJob) -> Sidecar:
        records = self._read(job.name)
        found = {name: self._column(name, records) for name in sorted(self.config.captions)}
        missing: list[tuple[str, str, str]] = []
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow",)) as commit:
            with tar_shard(commit) as samples:
                for key in records:
                    members: dict[str, bytes] = {}
                    reasons: dict[str, str] = {}
                    for name, column in found.items():
                        caption, reason = column[key]
                        if reason is None:
                            members[f"{name}.txt"] = caption.encode()
                        else:
                            reasons[name] = reason
                    if reasons:
                        members[MISSING_MEMBER] = canonical_json(reasons).encode()
                        missing += [(key, name, reason) for name, reason in reasons.items()]
                    samples.write(key, members)
            self._list(missing, commit)
            return commit.commit(f"{job.name}.tar")

    def _read(self, name: str) -> dict[str, dict[str, Any]]:
        """The json of every sample, as far as it is asked for."""
        asked = {field for one in self.config.captions.values() for field in (one.field, one.join_field)}
        records: dict[str, dict[str, Any]] = {}
        samples = read_samples(self.source, f"{name}.tar", read_sidecar(self.source, name), ("txt", "json"))
        for key, members in samples:
            try:
                record = json.loads(members.get("json", b"{}"))
            except ValueError as error:
                raise ShardError(
                    f"shard {self.source / name}.tar, key {key}: its json is broken: {error}"
                ) from error
            records[key] = {field: record[field] for field in asked if field in record}
        return records

    def _column(self, name: str, records: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str | None]]:
        """Caption of each key and None, or the reason why it has none."""
        column = self.config.captions[name]
        if column.field is not None:
            field = column.field
            return {
                key: self._judge(column, "no_field", record.get(field)) for key, record in records.items()
            }
        joins = {key: _join_value(key, record, column.join_field) for key, record in records.items()}
        table = self._tables[name].find({value for value in joins.values() if value is not None})
        captions: dict[str, tuple[str, str | None]] = {}
        for key, value in joins.items():
            if value is None:
                captions[key] = ("", "no_join_field")
            elif value not in table:
                captions[key] = ("", "no_row")
            else:
                captions[key] = self._judge(column, "empty", table[value])
        return captions

    @staticmethod
    def _judge(column: CaptionConfig, absent: str, caption: Any) -> tuple[str, str | None]:
        match caption:
            case None:
                return "", absent
            case str() if not caption.strip():
                return "", "empty"
            case str() if column.max_chars is not None and len(caption.strip()) > column.max_chars:
                return "", "too_long"
            case str():
                return caption.strip(), None
        return "", "not_text"

    @staticmethod
    def _list(missing: list[tuple[str, str, str]], commit: ShardCommit) -> None:
        if not missing:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(column, pa.string()) for column in zip(*missing, strict=True)]
        table = pa.table(columns, names=["key", "caption", "reason"])
        pq.write_table(table, commit.staging / f"{commit.name}.missing.parquet")


def _join_value(key: str, record: dict[str, Any], join_field: str | None) -> str | None:
    value = key if join_field is None else record.get(join_field)
    is_fit = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_fit else None


def count_coverage(config: CaptionsConfig, folder: Folder, shards: ShardTable) -> list[str]:
    """Writes `coverage.json`: of each column, how many samples have it, and how many lack it by reason.
    Returns its name, as a stage's `finish` does.
    """
    import pyarrow.parquet as pq

    missing: Counter[tuple[str, str]] = Counter()
    for name, files in zip(shards.names, shards.column("files"), strict=True):
        if (listed := f"{name}.missing.parquet") in json.loads(files):
            with folder.open(listed) as stream:
                table = pq.read_table(stream, columns=["caption", "reason"])
            missing.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
    columns = {}
    for name in sorted(config.captions):
        reasons = {reason: count for (column, reason), count in sorted(missing.items()) if column == name}
        columns[name] = {"present": shards.samples - sum(reasons.values()), "missing": reasons}
    folder.write(COVERAGE, json_bytes({"samples": shards.samples, "columns": columns}))
    return [COVERAGE]


def captions_stage(name: str, config: CaptionsConfig, images: Stage, place: Place) -> ShardStage:
    """The stage of a column of alternative captions. Raises ValueError where a table is missing."""

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        return count_coverage(config, folder, shards)

    return ShardStage(
        name,
        fingerprint_fields(name, config, place.digests.url),
        place.data / name,
        (images,),
        CaptionsWorker,
        {"source": images.folder, "config": config},
        config.actors,
        finish=finish,
    )
