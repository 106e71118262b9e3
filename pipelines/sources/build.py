"""How samples come in, whatever the source: the stages `source` and `ingest`, and what `plan` needs to know
of them.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.config import WorkflowConfig
from pipelines.dag import ShardStage, Stage
from pipelines.runtime.pool import ShardJob
from pipelines.shards.store import shard_name
from pipelines.sources import folder as image_folder
from pipelines.sources import parquet, scenes, tars, urls
from pipelines.sources.downloads import MAX_WAIT_SEC
from pipelines.stages import ingest
from pipelines.workflow.digests import Digests, flatten
from pipelines.workflow.plan import Entries
from repfusion.files import digest_of


def source_stage(config: WorkflowConfig, digests: Digests) -> ShardStage:
    source = config.source
    match source.kind:
        case "scenes":
            number, worker, arguments = (
                source.scenes.num_samples,
                scenes.SceneWorker,
                {"config": source.scenes},
            )
            fields = flatten(source.scenes.model_dump(mode="json"), "source.scenes.")
        case "urls":
            assert source.urls is not None
            listed = urls.UrlList(source.urls)
            number, worker, arguments = (
                len(listed),
                urls.UrlListWorker,
                {"config": source.urls, "files": listed.files},
            )
            fields = flatten(source.urls.model_dump(mode="json", exclude={"path", "options"}), "source.urls.")
            identities = [digests.url(file.url, source.urls.options) for file in listed.files]
            fields["source.urls.path"] = digest_of(identities)
        case other:
            raise AssertionError(f"{other} needs no lists")
    fields |= {"source.kind": source.kind, "source.shard_size": source.shard_size}
    starts = range(0, number, source.shard_size)
    jobs = tuple(
        ShardJob(shard_name(index), "", {}, {"start": start, "stop": min(start + source.shard_size, number)})
        for index, start in enumerate(starts)
    )
    folder = config.data_folder / "source"
    return ShardStage("source", fields, folder, (), worker, arguments, source.actors, jobs)


def ingest_stage(config: WorkflowConfig, source: Stage | None) -> ShardStage:
    return _read(config) if source is None else _download(config, source)


def _read(config: WorkflowConfig) -> ShardStage:
    """Ingest of what needs no download: the first stage of its workflow."""
    source, settings = config.source, config.ingest
    match source.kind:
        case "tars":
            assert source.tars is not None
            jobs, fields = tars.jobs(source.tars), tars.fingerprint_fields(source.tars, settings)
            worker, place = tars.TarWorker, source.tars
        case "folder":
            assert source.folder is not None
            jobs = image_folder.jobs(source.folder, source.shard_size)
            fields = image_folder.fingerprint_fields(source.folder, settings)
            worker, place = image_folder.FolderWorker, source.folder
        case "parquet":
            assert source.parquet is not None
            jobs = parquet.jobs(source.parquet, source.shard_size)
            fields = parquet.fingerprint_fields(source.parquet, settings)
            worker, place = parquet.ParquetWorker, source.parquet
        case other:
            raise AssertionError(f"{other} is downloaded")
    fields |= {"source.kind": source.kind}
    if source.kind != "tars":
        fields |= {"source.shard_size": source.shard_size}
    arguments = {"config": place, "ingest": settings}
    folder = config.data_folder / "ingest"
    return ShardStage("ingest", fields, folder, (), worker, arguments, settings.actors, jobs)


def _download(config: WorkflowConfig, source: Stage) -> ShardStage:
    is_embedded = config.source.kind == "scenes"

    @contextmanager
    def surround() -> Iterator[dict[str, Any]]:
        if not is_embedded:
            yield {}
        else:
            with scenes.serve(source.folder, config.source.port) as address:
                yield {"base_url": address, "own_server": True}

    settings = config.ingest
    if is_embedded:
        settings = settings.model_copy(update={"allow_private_addresses": True})
    arguments = {"source": source.folder, "config": settings, "num_actors": settings.actors.num_actors or 1}
    return ShardStage(
        "ingest",
        ingest.fingerprint_fields(config.ingest),
        config.data_folder / "ingest",
        (source,),
        ingest.IngestWorker,
        arguments,
        settings.actors.model_copy(update={"deadline_sec": _deadline_sec(config)}),
        reaches_out=not is_embedded,
        surround=surround,
    )


def _deadline_sec(config: WorkflowConfig) -> float:
    """Of a shard of downloads: as given, or far longer than its slowest servers could make it last."""
    settings = config.ingest
    if settings.actors.deadline_sec is not None:
        return settings.actors.deadline_sec
    attempts, size = settings.retries + 1, config.source.shard_size
    waits = settings.retry_backoff_sec * 2**settings.retries + settings.timeout_sec * attempts
    waits += MAX_WAIT_SEC * settings.retries
    seconds = 600 + 2 * waits * size / settings.num_threads
    if rate := settings.max_requests_per_sec_per_host:
        seconds += 2 * size * attempts * (settings.actors.num_actors or 1) / rate
    return seconds


def _entries(config: WorkflowConfig, number: int) -> Entries:
    """A source of numbered entries, of which every so manieth is a probe."""
    size = config.source.shard_size

    def probe(wanted: int, offset: int) -> tuple[ShardJob, ...]:
        step = max(1, number // wanted)
        start = offset * step // 2 if step > 1 else 0
        return (ShardJob("", "", {}, {"start": start, "stop": number, "step": step}),)

    return Entries(number, [shard_name(index) for index in range(-(-number // size))], probe)


def source_entries(config: WorkflowConfig) -> Entries:
    """How many entries the source has, and how to take a few."""
    source, size = config.source, config.source.shard_size
    match source.kind:
        case "scenes":
            return _entries(config, source.scenes.num_samples)
        case "urls":
            assert source.urls is not None
            return _entries(config, len(urls.UrlList(source.urls)))
        case "tars":
            assert source.tars is not None
            names = [job.name for job in tars.jobs(source.tars)]
            probe = functools.partial(tars.probe_jobs, source.tars)
            return Entries(tars.num_entries(source.tars), names, probe)
        case "folder":
            assert source.folder is not None
            names = [job.name for job in image_folder.jobs(source.folder, size)]
            probe = functools.partial(image_folder.probe_jobs, source.folder)
            return Entries(image_folder.num_entries(source.folder), names, probe)
        case "parquet":
            assert source.parquet is not None
            names = [job.name for job in parquet.jobs(source.parquet, size)]
            probe = functools.partial(parquet.probe_jobs, source.parquet)
            return Entries(parquet.num_entries(source.parquet), names, probe)
