"""A list of image addresses and captions (parquet or csv) -> url lists of a shard's size, in order and
with keys.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pipelines.pool import ShardJob
from pipelines.store import ShardCommit, Sidecar, sample_key

if TYPE_CHECKING:
    import pyarrow as pa


class UrlsConfig(BaseModel):
    """A list of addresses to download."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: Path
    """A .parquet or .csv file."""
    url_column: str = "url"
    """Its column of addresses."""
    caption_column: str = "caption"
    """Its column of captions; an empty or missing one is dropped, and counted, by `curate`."""


def read_list(config: UrlsConfig) -> "pa.Table":
    """The list as columns url and caption, strings.

    Raises:
        ValueError: where the file is missing, of another kind, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    if not config.path.is_file():
        raise ValueError(
            f"source.urls.path: {config.path} is not a file; expected a .parquet or .csv url list"
        )
    match config.path.suffix:
        case ".parquet":
            table = pq.read_table(config.path)
        case ".csv":
            table = pyarrow.csv.read_csv(config.path)
        case other:
            raise ValueError(f"source.urls.path: {config.path} ends in {other!r}; expected .parquet or .csv")
    for column in (config.url_column, config.caption_column):
        if column not in table.column_names:
            raise ValueError(
                f"source.urls: {config.path} has no column {column!r}; it has {table.column_names}"
            )
    columns = [
        table[config.url_column].cast(pa.string()),
        table[config.caption_column].cast(pa.string()).fill_null(""),
    ]
    return pa.table(columns, names=["url", "caption"])


class UrlListWorker:
    """Writes one shard of the list: `NAME.parquet` with columns key, url, caption."""

    def __init__(self, folder: Path, config: UrlsConfig):
        self.folder, self.table = folder, read_list(config)

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, stop = job.arguments["start"], job.arguments["stop"]
        rows = self.table.slice(start, stop - start)
        rows = rows.add_column(0, "key", pa.array([sample_key(index) for index in range(start, stop)]))
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("pyarrow",)) as commit:
            commit.samples = len(rows)
            pq.write_table(rows, commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")
