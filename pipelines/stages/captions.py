"""Image shards -> a column of alternative captions (`KEY.long.txt` for the column `long`), from fields of the
samples' json or from tables. The images are not written again.

No sample is dropped: one that lacks a caption is listed in `NAME.missing.parquet` (key, caption, reason) and
has a member `KEY.missing.json`, so that the tar holds every key.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.dag import Place, ShardStage, Stage
from pipelines.limits import Limits, MostTokens, limit_fields
from pipelines.lists.blocks import key_text
from pipelines.lists.captions import all_texts, one_text
from pipelines.lists.columns import caption_column, key_column
from pipelines.lists.tables import LIST_ENDINGS, TABLE_ENDINGS, CsvFormat, Table, open_table
from pipelines.lists.values import BadEntry
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.manifest import ShardTable
from pipelines.shards.parquet import read_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.sources.inputs import InputFile, find_inputs
from repfusion.config import Config, Strict
from repfusion.files import canonical_json, digest_of, json_bytes
from repfusion.llm.tokenizer import CaptionLimit

COVERAGE = "coverage.json"
"""How many samples have each caption, and why the others lack it."""
MISSING_MEMBER = "missing.json"


class CaptionConfig(Strict):
    """Where one alternative caption comes from: a field of each sample's json, or a table."""

    field: str | None = None
    """Field of the json, such as a further column of the source."""
    table: str | None = None
    """A .parquet, .csv, .tsv, .jsonl or .json file, a folder of them or a pattern; local or any fsspec URL.
    Parquet that is sorted by its key column is read a part at a time; of anything else each shard reads all.
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
    csv: CsvFormat = CsvFormat()
    """How csv and tsv tables are written."""
    item: int | None = Field(default=None, ge=0)
    """Which one to take where a caption is several, a list or the lines of a text: 0 is the first. None takes
    a text as it is, and no lists.
    """
    max_chars: int | None = Field(default=None, ge=1)
    """A caption of more characters counts as lacking; None takes any."""
    max_tokens: MostTokens = "context"
    """A caption of more tokens counts as lacking; see `curate.max_caption_tokens`."""
    options: dict[str, Any] = {}
    """Options of the table's fsspec file system: an endpoint, a profile. Changes no bytes."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> "CaptionConfig":
        if (self.field is None) == (self.table is None):
            raise ValueError("give either field (of the json) or table (of captions)")
        if self.field is not None and (
            idle := self.model_fields_set & {"key_column", "join_field", "caption_column", "csv"}
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
    column: str,
    config: CaptionsConfig,
    identify: Callable[[str, Mapping[str, Any]], str],
    limits: Mapping[str, Limits] = {},
) -> dict[str, Any]:
    """What decides the bytes of the column of a name; `identify` gives what changes with a file's content, by
    its URL and options, `limits` is by caption. Raises ValueError where a table is missing.
    """
    fields: dict[str, Any] = {}
    for name, caption in sorted(config.captions.items()):
        prefix = f"columns.{column}.captions.{name}."
        fields[f"{prefix}max_chars"] = caption.max_chars
        fields[f"{prefix}item"] = caption.item
        fields[f"{prefix}max_tokens"] = limit_fields(limits.get(name, {}))
        if caption.table is None:
            fields[f"{prefix}field"] = caption.field
            continue
        for key in ("key_column", "join_field", "caption_column"):
            fields[prefix + key] = getattr(caption, key)
        fields |= flatten(caption.csv.model_dump(mode="json"), f"{prefix}csv.")
        files = table_files(name, caption)
        fields[f"{prefix}table"] = digest_of([identify(file.url, caption.options) for file in files])
    return fields


def table_files(name: str, column: CaptionConfig) -> tuple[InputFile, ...]:
    """Raises ValueError where there is none."""
    assert column.table is not None
    return find_inputs(column.table, TABLE_ENDINGS, f"captions.{name}.table", column.options, LIST_ENDINGS)


class _Table:
    """Captions by key, over all files of a table.

    Raises:
        ValueError: where a file is missing, not readable, or lacks a column or has one of an unfit type.
    """

    def __init__(self, name: str, column: CaptionConfig):
        self._name, self._column = name, column
        self._files = table_files(name, column)
        for file in self._files:
            with self._open(file):
                pass

    def _open(self, file: InputFile) -> AbstractContextManager[Table]:
        column, key = self._column, f"captions.{self._name}"
        remedy = f"{key}.item" if column.item is None else None
        needed = [
            key_column(column.key_column, f"{key}.key_column"),
            caption_column(column.caption_column, f"{key}.caption_column", remedy),
        ]
        return open_table(file.url, column.options, needed, f"{key}.table: {file.url}", column.csv)

    def find(self, keys: Collection[str]) -> dict[str, Any]:
        """The captions of those keys that the table has, as cells; row groups that can hold none are not
        read.
        """
        name = self._column.key_column
        found: dict[str, Any] = {}
        for file in self._files:
            with self._open(file) as table:
                for section in range(table.num_sections):
                    if not table.may_hold(section, name, keys):
                        continue
                    for block in table.blocks(section):
                        kept = block.where(name, keys)
                        captions = kept.cells(self._column.caption_column)
                        for key, caption in zip(kept.cells(name), captions, strict=True):
                            found.setdefault(str(key), caption)
        return found


class CaptionsWorker:
    """Makes `NAME.tar` of alternative captions.

    Reasons why a sample lacks one: no_field, not_text, undecodable_caption, no_item, empty, too_long,
    too_many_tokens, and where it comes from a table no_join_field, no_row.

    Args:
        folder: of the stage.
        source: folder of the image shards.
        config: the stage's.
        limits: how many tokens each caption may have.
    """

    concurrency: ClassVar[int] = 2

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        config: CaptionsConfig,
        limits: Mapping[str, Collection[CaptionLimit]] = {},
    ):
        self.folder, self.source, self.config, self.limits = folder, source, config, limits
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
            return {key: self._judge(name, "no_field", record.get(field)) for key, record in records.items()}
        joins = {key: _join_value(key, record, column.join_field) for key, record in records.items()}
        table = self._tables[name].find({value for value in joins.values() if value is not None})
        captions: dict[str, tuple[str, str | None]] = {}
        for key, value in joins.items():
            if value is None:
                captions[key] = ("", "no_join_field")
            elif value not in table:
                captions[key] = ("", "no_row")
            else:
                captions[key] = self._judge(name, "empty", table[value])
        return captions

    def _judge(self, name: str, absent: str, caption: Any) -> tuple[str, str | None]:
        column = self.config.captions[name]
        if caption is None:
            return "", absent
        try:
            if column.item is None:
                text = (one_text(caption) or "").strip()
            else:
                texts = all_texts(caption)
                if column.item >= len(texts):
                    return "", "no_item"
                text = texts[column.item]
        except BadEntry as error:
            return "", error.reason
        if not text:
            return "", "empty"
        if column.max_chars is not None and len(text) > column.max_chars:
            return "", "too_long"
        if any(limit.excess(text) for limit in self.limits.get(name, ())):
            return "", "too_many_tokens"
        return text, None

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
    return key_text(key if join_field is None else record.get(join_field))


def count_coverage(config: CaptionsConfig, folder: Folder, shards: ShardTable) -> list[str]:
    """Writes `coverage.json`: of each column, how many samples have it, and how many lack it by reason.
    Returns its name, as a stage's `finish` does.
    """
    missing: Counter[tuple[str, str]] = Counter()
    for name, files in zip(shards.names, shards.column("files"), strict=True):
        if (listed := f"{name}.missing.parquet") in json.loads(files):
            table = read_parquet(folder, listed, ["caption", "reason"])
            missing.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
    columns = {}
    for name in sorted(config.captions):
        reasons = {reason: count for (column, reason), count in sorted(missing.items()) if column == name}
        columns[name] = {"present": shards.samples - sum(reasons.values()), "missing": reasons}
    folder.write(COVERAGE, json_bytes({"samples": shards.samples, "columns": columns}))
    return [COVERAGE]


def captions_stage(
    name: str, config: CaptionsConfig, limits: Mapping[str, Limits], images: Stage, place: Place
) -> ShardStage:
    """The stage of a column of alternative captions; `limits` is by caption. Raises ValueError where a table
    is missing.
    """

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        return count_coverage(config, folder, shards)

    return ShardStage(
        name,
        fingerprint_fields(name, config, place.digests.url, limits),
        place.data / name,
        (images,),
        CaptionsWorker,
        {
            "source": images.folder,
            "config": config,
            "limits": {caption: tuple(one.values()) for caption, one in limits.items()},
        },
        config.actors,
        finish=finish,
    )
