"""The kinds of sources: a section of the configuration -> the source that it asks for."""

from typing import Annotated

from pydantic import Field

from pipelines.sources.base import Source
from pipelines.sources.edits import EditsConfig, EditsSource
from pipelines.sources.folder import FolderConfig, FolderSource
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.moving import MovingScenesConfig, MovingScenesSource
from pipelines.sources.parquet import ParquetConfig, ParquetSource
from pipelines.sources.raw_samples import picture_endings
from pipelines.sources.scenes import ScenesConfig, ScenesSource
from pipelines.sources.tars import TarsConfig, TarsSource
from pipelines.sources.urls import UrlsConfig, UrlsSource

SourceConfig = Annotated[
    ScenesConfig | EditsConfig | MovingScenesConfig | UrlsConfig | TarsConfig | FolderConfig | ParquetConfig,
    Field(discriminator="kind"),
]


def source_of(config: SourceConfig, ingest: IngestConfig) -> Source:
    """The source of a section; `ingest` says whether it is read for images or for clips."""
    match config:
        case ScenesConfig():
            return ScenesSource(config)
        case EditsConfig():
            return EditsSource(config)
        case MovingScenesConfig():
            return MovingScenesSource(config)
        case UrlsConfig():
            return UrlsSource(config)
        case TarsConfig():
            return TarsSource(config)
        case FolderConfig():
            return FolderSource(config, picture_endings(ingest))
        case ParquetConfig():
            return ParquetSource(config)
