"""A complete stage on disk: `manifest.json`, what decided its bytes, and `shards.parquet`, a row a shard.

Rows stay in Arrow columns: a workflow may have 100,000 shards in each of its stages, and `status` looks at
all of them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from pipelines.shards.parquet import parse_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import SCHEMA, ShardError, Sidecar, SideFile
from repfusion.config import Strict
from repfusion.files import canonical_json, digest_of, json_bytes

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
SHARDS = "shards.parquet"


class Manifest(Strict):
    """A complete stage: what decided its bytes (`fields`, `upstream`), and what it holds in all."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = Field(default=SCHEMA, alias="schema")
    stage: str
    fingerprint: str
    fields: dict[str, Any]
    """The configuration that decides the bytes, as flat dotted names."""
    upstream: dict[str, str]
    """Fingerprints of the stages it reads."""
    lineage: dict[str, dict[str, Any]]
    """`fields` of every stage above, so that a stale stage can say what changed."""
    num_shards: int
    samples: int
    bytes: int
    """Bytes of all shards and their side files."""
    shards_digest: str
    """Names the shards' data: see `ShardTable.digest`."""
    drops: dict[str, int]
    seconds: float
    """Seconds from the stage's start to its end, of the run that completed it."""
    shard_seconds: float
    """Seconds of all shards, one after the other."""
    files: dict[str, SideFile]
    """Files of the stage as a whole, such as `statistics.safetensors`."""
    extra: dict[str, Any]

    @property
    def digest(self) -> str:
        """Names the data: sha256 of the canonical JSON without times."""
        return digest_of(self.model_dump(mode="json", by_alias=True, exclude={"seconds", "shard_seconds"}))


class ShardTable:
    """The sidecars of a stage's shards, in the order of the stage."""

    def __init__(self, table: "pa.Table"):
        self._table = table

    @classmethod
    def of(cls, sidecars: Iterable[Sidecar]) -> "ShardTable":
        """Keeps the sidecars' order."""
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in Sidecar.model_fields}
        for sidecar in sidecars:
            for name, values in columns.items():
                value = getattr(sidecar, name)
                if name == "files":
                    value = {file: side.model_dump() for file, side in value.items()}
                values.append(canonical_json(value) if isinstance(value, dict) else value)
        kinds = {"samples": pa.int64(), "bytes": pa.int64(), "seconds": pa.float64()}
        return cls(
            pa.table(
                {name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()}
            )
        )

    @classmethod
    def read(cls, folder: Folder) -> "ShardTable":
        """Raises ShardError where the table is missing or cannot be read."""
        import pyarrow as pa

        try:
            data = folder.read(SHARDS)
        except FileNotFoundError as error:
            raise ShardError(f"{folder / SHARDS}: no such file; 'run' writes it again") from error
        try:
            return cls(parse_parquet(data, read_dictionary=["fingerprint", "drops", "versions"]))
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{folder / SHARDS}: not readable ({error}); delete it and run again") from error

    def write(self, folder: Folder) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = pa.BufferOutputStream()
        pq.write_table(self._table, stream)
        folder.write(SHARDS, stream.getvalue().to_pybytes())

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Sidecar]:
        for batch in self._table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                yield self._sidecar(row)

    def __getitem__(self, index: int) -> Sidecar:
        return self._sidecar(self._table.slice(index, 1).to_pylist()[0])

    @staticmethod
    def _sidecar(row: dict[str, Any]) -> Sidecar:
        parsed = {name: json.loads(row[name]) for name in ("inputs", "drops", "files", "versions")}
        return Sidecar.model_validate(row | parsed)

    @cached_property
    def names(self) -> list[str]:
        return self.column("name")

    def column(self, name: str) -> list[Any]:
        """A field of every sidecar; `inputs`, `drops`, `files` and `versions` as canonical JSON."""
        return self._table[name].to_pylist()

    @cached_property
    def samples(self) -> int:
        return sum(self.column("samples"))

    @cached_property
    def bytes(self) -> int:
        """Bytes of the shards and their side files."""
        beside = sum(
            side["bytes"]
            for text in self.column("files")
            if text != "{}"
            for side in json.loads(text).values()
        )
        return sum(self.column("bytes")) + beside

    @cached_property
    def drops(self) -> dict[str, int]:
        """Samples left out, by reason."""
        total: Counter[str] = Counter()
        for text, times in Counter(self.column("drops")).items():
            for reason, number in json.loads(text).items():
                total[reason] += number * times
        return dict(sorted(total.items()))

    @cached_property
    def digest(self) -> str:
        """sha256 over names, sizes, hashes and drops of the shards: times, library versions and where the
        bytes came from are left out.
        """
        digest = hashlib.sha256()
        columns = [
            self.column(name) for name in ("name", "file", "samples", "bytes", "sha256", "drops", "files")
        ]
        for row in zip(*columns, strict=True):
            digest.update("\t".join(map(str, row)).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class StageOutput:
    """A complete stage, its shards read when they are asked for."""

    folder: Folder
    manifest: Manifest

    @cached_property
    def shards(self) -> ShardTable:
        return ShardTable.read(self.folder)


Upstream = Mapping[str, StageOutput]
"""The complete stages before one, by name."""


def read_output(folder: Folder) -> StageOutput | None:
    """What a stage's folder holds, or None where the stage never completed (or another schema wrote it)."""
    try:
        return StageOutput(folder, Manifest.model_validate_json(folder.read(MANIFEST)))
    except (FileNotFoundError, ValueError):
        return None


def write_output(folder: Folder, manifest: Manifest, shards: ShardTable) -> StageOutput:
    """Writes the table of shards and then the manifest, which marks the stage complete."""
    if len(shards):
        shards.write(folder)
    folder.write(MANIFEST, json_bytes(manifest.model_dump(mode="json", by_alias=True)))
    return StageOutput(folder, manifest)
