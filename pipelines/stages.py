"""A workflow's configuration -> its stages, each with the fields that decide its bytes and what to run."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pipelines import (
    captions,
    curate,
    features,
    folder_source,
    ingest,
    judge,
    latents,
    parquet_source,
    scenes_source,
    tar_source,
    url_source,
)
from pipelines.config import StageName, WorkflowConfig
from pipelines.downloads import MAX_WAIT_SEC
from pipelines.duplicates import DUPLICATES, find_duplicates
from pipelines.manifest import ShardTable, Upstream
from pipelines.plan import Entries
from pipelines.pool import ShardJob
from pipelines.session import in_worker
from pipelines.stage import ShardStage, Stage, WholeStage
from pipelines.storage import Folder
from pipelines.store import digest_of, file_sha256, shard_name, write_json
from pipelines.summary import write_summary

STATISTICS = "statistics.safetensors"
NOT_BYTES = ("output_dir", "data", "tracking", "keep_resume", "log_every_steps")
"""Fields of the training that do not change its weights."""


class Digests:
    """sha256 of weight folders and files, remembered in the root by size and time of change: a 7B model is
    read once.
    """

    def __init__(self, root: Path):
        self._path = root / "digests.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            self._known = {}

    def file(self, path: Path) -> str:
        stat, name = path.stat(), str(path.resolve())
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self._known.get(name, [None])[:2] != stamp:
            self._known[name] = [*stamp, file_sha256(path)]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
        return self._known[name][2]

    def url(self, url: str, options: Mapping[str, Any]) -> str:
        """sha256 of a local file; of a remote one, what its store says of the version: size and tag, or its
        date.
        """
        if "://" not in url:
            return self.file(Path(url))
        import fsspec

        files, path = fsspec.core.url_to_fs(url, **options)
        info = files.info(path)
        return digest_of(
            [info["size"], str(info.get("ETag") or info.get("LastModified") or info.get("mtime"))]
        )

    def folder(self, path: Path, key: str) -> str:
        """Over the names and bytes of a model folder's files. Raises ValueError, naming the config key,
        where it is missing.
        """
        if not path.is_dir():
            raise ValueError(
                f"{key}: {path} is no folder; give one written by save_pretrained, or run 'make foundation'"
            )
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        return digest_of({file.name: self.file(file) for file in files if file.suffix != ".md"})


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def build_stages(
    config: WorkflowConfig, started: float | None = None, digests: Digests | None = None
) -> list[Stage]:
    """The stages up to `last_stage`, in an order in which each follows what it reads. `started` is when the
    run began (perf_counter); `digests` are those remembered in the root unless given.

    Raises:
        ValueError: where a url list or a weights folder is missing.
    """
    last = get_args(StageName).index(config.last_stage)
    absent = {
        "source": not config.source.makes_lists,
        "captions": not config.captions.columns,
        "features": not config.features.enabled,
    }
    wanted = [name for name in get_args(StageName)[: last + 1] if not absent.get(name)]
    digests = digests or Digests(config.root)
    stages: dict[str, Stage] = {}
    for name in wanted:
        match name:
            case "source":
                stages[name] = _source(config, digests)
            case "ingest":
                stages[name] = _ingest(config, stages.get("source"))
            case "judge":
                stages[name] = _judge(config, stages["ingest"])
            case "curate":
                stages[name] = _curate(config, stages["ingest"], stages["judge"])
            case "captions":
                stages[name] = _captions(config, stages["curate"], digests)
            case "latents":
                stages[name] = _latents(config, stages["curate"], digests)
            case "features":
                stages[name] = _features(config, stages["curate"], stages.get("captions"), digests)
            case "train":
                stages[name] = _train(config, stages, digests)
            case "evaluate":
                stages[name] = _evaluate(config, stages["train"])
            case "report":
                stages[name] = _report(
                    config, stages["evaluate"], time.perf_counter() if started is None else started
                )
    return list(stages.values())


def data_stages(config: WorkflowConfig) -> list[ShardStage]:
    """Those made of shards: source to features."""
    return [stage for stage in build_stages(config) if isinstance(stage, ShardStage)]


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
            return _entries(config, len(url_source.UrlList(source.urls)))
        case "tars":
            assert source.tars is not None
            names = [job.name for job in tar_source.jobs(source.tars)]
            probe = functools.partial(tar_source.probe_jobs, source.tars)
            return Entries(tar_source.num_entries(source.tars), names, probe)
        case "folder":
            assert source.folder is not None
            names = [job.name for job in folder_source.jobs(source.folder, size)]
            probe = functools.partial(folder_source.probe_jobs, source.folder)
            return Entries(folder_source.num_entries(source.folder), names, probe)
        case "parquet":
            assert source.parquet is not None
            names = [job.name for job in parquet_source.jobs(source.parquet, size)]
            probe = functools.partial(parquet_source.probe_jobs, source.parquet)
            return Entries(parquet_source.num_entries(source.parquet), names, probe)


def probe_stages(config: WorkflowConfig) -> Callable[[Path], list[ShardStage]]:
    """The data stages with their folders under a path; duplicates stay: a few samples say nothing of them."""

    def build(scratch: Path) -> list[ShardStage]:
        changes = {
            "root": scratch,
            "data_url": None,
            "storage_options": {},
            "curate": config.curate.model_copy(update={"duplicates": "keep", "max_drop_fraction": 1.0}),
            "ingest": config.ingest.model_copy(update={"max_drop_fraction": 1.0}),
        }
        # with the digests of the real root, or each plan would read all weights again
        stages = build_stages(config.model_copy(update=changes), digests=Digests(config.root))
        return [stage for stage in stages if isinstance(stage, ShardStage)]

    return build


def _source(config: WorkflowConfig, digests: Digests) -> ShardStage:
    source = config.source
    match source.kind:
        case "scenes":
            number, worker, arguments = (
                source.scenes.num_samples,
                scenes_source.SceneWorker,
                {"config": source.scenes},
            )
            fields = _flatten(source.scenes.model_dump(mode="json"), "source.scenes.")
        case "urls":
            assert source.urls is not None
            listed = url_source.UrlList(source.urls)
            number, worker, arguments = (
                len(listed),
                url_source.UrlListWorker,
                {"config": source.urls, "files": listed.files},
            )
            fields = _flatten(
                source.urls.model_dump(mode="json", exclude={"path", "options"}), "source.urls."
            )
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


def _ingest(config: WorkflowConfig, source: Stage | None) -> ShardStage:
    return _read(config) if source is None else _download(config, source)


def _read(config: WorkflowConfig) -> ShardStage:
    """Ingest of what needs no download: the first stage of its workflow."""
    source, settings = config.source, config.ingest
    match source.kind:
        case "tars":
            assert source.tars is not None
            jobs, fields = tar_source.jobs(source.tars), tar_source.fingerprint_fields(source.tars, settings)
            worker, place = tar_source.TarWorker, source.tars
        case "folder":
            assert source.folder is not None
            jobs = folder_source.jobs(source.folder, source.shard_size)
            fields = folder_source.fingerprint_fields(source.folder, settings)
            worker, place = folder_source.FolderWorker, source.folder
        case "parquet":
            assert source.parquet is not None
            jobs = parquet_source.jobs(source.parquet, source.shard_size)
            fields = parquet_source.fingerprint_fields(source.parquet, settings)
            worker, place = parquet_source.ParquetWorker, source.parquet
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
            with scenes_source.serve(source.folder, config.source.port) as address:
                yield {"base_url": address}

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


def _judge(config: WorkflowConfig, raw: Stage) -> ShardStage:
    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        # in a task: its memory grows with the number of samples, the driver's must not
        return in_worker(find_duplicates, folder, shards, config.curate)

    fields, folder = curate.judge_fields(config.curate), config.data_folder / "judge"
    arguments = {"source": raw.folder, "config": config.curate}
    actors = config.curate.actors
    return ShardStage("judge", fields, folder, (raw,), judge.JudgeWorker, arguments, actors, finish=finish)


def _curate(config: WorkflowConfig, raw: Stage, judged: Stage) -> ShardStage:
    fields, folder = curate.curate_fields(config.curate), config.data_folder / "curate"
    arguments = {"source": raw.folder, "judged": judged.folder, "config": config.curate}
    return ShardStage(
        "curate",
        fields,
        folder,
        (raw, judged),
        curate.CurateWorker,
        arguments,
        config.curate.actors,
        stage_files=(("judge", DUPLICATES),),
    )


def _captions(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        return captions.count_coverage(config.captions, folder, shards)

    return ShardStage(
        "captions",
        captions.fingerprint_fields(config.captions, digests.url),
        config.data_folder / "captions",
        (images,),
        captions.CaptionsWorker,
        {"source": images.folder, "config": config.captions},
        config.captions.actors,
        finish=finish,
    )


def _latents(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    encoder = config.train.model.encoder
    digest = digests.folder(encoder.path, "train.model.encoder.path")

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        latents.merge_statistics(folder, shards.names, STATISTICS)
        return [STATISTICS]

    fields, folder = latents.fingerprint_fields(encoder, digest), config.data_folder / "latents"
    arguments = {"source": images.folder, "config": config.latents, "encoder": encoder}
    return ShardStage(
        "latents",
        fields,
        folder,
        (images,),
        latents.LatentsWorker,
        arguments,
        config.latents.actors,
        finish=finish,
    )


def _features(config: WorkflowConfig, images: Stage, others: Stage | None, digests: Digests) -> ShardStage:
    """`others` is the stage of alternative captions."""
    model, names = config.train.model, tuple(config.captions.columns)
    digest = digests.folder(model.mllm, "train.model.mllm")
    arguments = {
        "source": images.folder,
        "config": config.features,
        "mllm": model.mllm,
        "mllm_dtype": model.mllm_dtype,
        "captions": None if others is None else others.folder,
        "names": names,
    }
    fields = features.fingerprint_fields(digest, model.mllm_dtype, config.features, names)
    folder = config.data_folder / "features"
    above = (images,) if others is None else (images, others)
    return ShardStage(
        "features", fields, folder, above, features.FeaturesWorker, arguments, config.features.actors
    )


def _train(config: WorkflowConfig, stages: Mapping[str, Stage], digests: Digests) -> WholeStage:
    values = config.train.model_dump(mode="json", exclude=set(NOT_BYTES))
    fields = _flatten(values, "train.") | {"num_train_workers": config.num_train_workers}
    model = config.train.model
    for key, path in {
        "train.model.encoder.path": model.encoder.path,
        "train.model.mllm": model.mllm,
        "train.model.decoder": model.decoder,
        "train.init_from": config.train.init_from,
    }.items():
        fields[key] = None if path is None else digests.folder(path, key)
    fields["train.data.caption_weights"] = config.train.data.caption_weights
    upstream = [stages["curate"], stages["latents"]]
    if config.train.data.captions is not None and "captions" in stages:
        upstream.append(stages["captions"])
    if config.train.data.text is not None and "features" in stages:
        upstream.append(stages["features"])

    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.train import run_train

        return run_train(config)

    return WholeStage("train", fields, _local(config, "train"), tuple(upstream), execute)


def _evaluate(config: WorkflowConfig, train: Stage) -> WholeStage:
    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.evaluate import run_evaluate

        return run_evaluate(config)

    values = {**config.evaluate.scoring.model_dump(mode="json"), "every_steps": config.evaluate.every_steps}
    fields = _flatten(values, "evaluate.")
    return WholeStage("evaluate", fields, _local(config, "evaluate"), (train,), execute)


def _report(config: WorkflowConfig, evaluate: Stage, started: float) -> WholeStage:
    def execute(above: Upstream) -> dict[str, Any]:
        from pipelines.report import write_report

        # the page shows the summary; its own seconds are added when the run ends
        manifests = {name: output.manifest for name, output in above.items()}
        write_summary(config.root, manifests, time.perf_counter() - started)
        write_report(config.root, config.data_folder)
        return {}

    outputs = (config.root / "report.html", config.root / "gallery.png")
    return WholeStage("report", {}, _local(config, "report"), (evaluate,), execute, outputs, needs_ray=False)


def _local(config: WorkflowConfig, name: str) -> Folder:
    return Folder(str(config.root / name))
