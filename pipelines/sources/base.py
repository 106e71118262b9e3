"""What a workflow asks of a source: its stages up to `ingest`, and its entries for `plan`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.store import shard_name
from pipelines.sources.ingest import IngestConfig, IngestWorker, fingerprint_fields
from pipelines.sources.web.downloads import MAX_WAIT_SEC


@dataclass(frozen=True)
class Entries:
    """What a source holds, and how to take a few of them."""

    num_entries: int
    shard_names: Sequence[str]
    probe: Callable[[int, int], tuple[ShardJob, ...]]
    """(how many samples, offset) -> jobs that read about as many, evenly spread."""


class Source(Protocol):
    """A kind of source, made of its section of the configuration."""

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        """`source`, where entries are listed and then downloaded, and `ingest`, which is last. Raises
        ValueError, naming the config key, where there is nothing to read.
        """
        ...

    def entries(self) -> Entries:
        """What there is to ingest; raises what `stages` raises."""
        ...


def numbered_entries(number: int, shard_size: int) -> Entries:
    """Entries of a list, of which every so manieth is a probe."""

    def probe(wanted: int, offset: int) -> tuple[ShardJob, ...]:
        step = max(1, number // wanted)
        start = offset * step // 2 if step > 1 else 0
        return (ShardJob("", "", {}, {"start": start, "stop": number, "step": step}),)

    return Entries(number, [shard_name(index) for index in range(-(-number // shard_size))], probe)


def list_stage(
    worker: type,
    arguments: Mapping[str, Any],
    fields: Mapping[str, Any],
    number: int,
    shard_size: int,
    actors: ActorsConfig,
    place: Place,
) -> ShardStage:
    """The stage `source`, which lists what `ingest` downloads: `number` entries, `shard_size` to a shard."""
    jobs = ranged_jobs(number, shard_size)
    return ShardStage(
        "source", dict(fields), place.data / "source", (), worker, dict(arguments), actors, jobs
    )


def ranged_jobs(number: int, shard_size: int) -> tuple[ShardJob, ...]:
    """A shard for every `shard_size` of so many entries, which are known by their positions."""
    return tuple(
        ShardJob(shard_name(index), "", {}, {"start": start, "stop": min(start + shard_size, number)})
        for index, start in enumerate(range(0, number, shard_size))
    )


def read_stage(
    worker: type,
    config: Any,
    fields: Mapping[str, Any],
    jobs: tuple[ShardJob, ...],
    ingest: IngestConfig,
    place: Place,
) -> ShardStage:
    """The stage `ingest` of a source that is read: the first one of its workflow."""
    arguments = {"config": config, "ingest": ingest}
    return ShardStage(
        "ingest", dict(fields), place.data / "ingest", (), worker, arguments, ingest.actors, jobs
    )


def download_stage(
    source: ShardStage,
    ingest: IngestConfig,
    shard_size: int,
    place: Place,
    own_server: Callable[[], AbstractContextManager[dict[str, Any]]] | None = None,
) -> ShardStage:
    """The stage `ingest` of a source that is downloaded. `own_server` gives the arguments of IngestWorker
    that lead to a server on loopback; without one, servers of others are asked.
    """
    # the fingerprint is of what was configured: that our own server is on loopback changes no bytes
    settings = ingest if own_server is None else ingest.model_copy(update={"allow_private_addresses": True})
    arguments = {"source": source.folder, "config": settings, "num_actors": ingest.actors.num_actors or 1}
    return ShardStage(
        "ingest",
        fingerprint_fields(ingest),
        place.data / "ingest",
        (source,),
        IngestWorker,
        arguments,
        ingest.actors.model_copy(update={"deadline_sec": _deadline_sec(ingest, shard_size)}),
        reaches_out=own_server is None,
        surround=own_server or (lambda: nullcontext({})),
    )


def _deadline_sec(ingest: IngestConfig, shard_size: int) -> float:
    """Seconds for a shard: as given, or far longer than its slowest servers could make it last."""
    if ingest.actors.deadline_sec is not None:
        return ingest.actors.deadline_sec
    attempts = ingest.retries + 1
    waits = ingest.retry_backoff_sec * 2**ingest.retries + ingest.timeout_sec * attempts
    waits += MAX_WAIT_SEC * ingest.retries
    seconds = 600 + 2 * waits * shard_size / ingest.num_threads
    if rate := ingest.max_requests_per_sec_per_host:
        seconds += 2 * shard_size * attempts * (ingest.actors.num_actors or 1) / rate
    return seconds
