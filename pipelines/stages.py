"""A workflow's configuration -> its stages, each with the fields that decide its bytes and what to run."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from pipelines import curate, features, ingest, latents, scenes_source, url_source
from pipelines.config import StageName, WorkflowConfig
from pipelines.pool import ShardJob
from pipelines.store import Manifest, Sidecar, digest_of, file_sha256, shard_name, write_json
from pipelines.summary import write_summary
from pipelines.workflow import ShardStage, Stage, WholeStage

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


def build_stages(config: WorkflowConfig, started: float | None = None) -> list[Stage]:
    """The stages up to `last_stage`, in an order in which each follows what it reads. `started` is when the
    run began (perf_counter).

    Raises:
        ValueError: where a url list or a weights folder is missing.
    """
    last = get_args(StageName).index(config.last_stage)
    wanted = [
        name for name in get_args(StageName)[: last + 1] if name != "features" or config.features.enabled
    ]
    digests = Digests(config.root)
    stages: dict[str, Stage] = {}
    for name in wanted:
        match name:
            case "source":
                stages[name] = _source(config, digests)
            case "ingest":
                stages[name] = _ingest(config, stages["source"])
            case "curate":
                arguments = {"source": config.root / "ingest", "config": config.curate}
                fields = curate.fingerprint_fields(config.curate)
                stages[name] = ShardStage(
                    name, fields, (stages["ingest"],), curate.CurateWorker, arguments, config.curate.actors
                )
            case "latents":
                stages[name] = _latents(config, stages["curate"], digests)
            case "features":
                stages[name] = _features(config, stages["curate"], digests)
            case "train":
                stages[name] = _train(config, stages, digests)
            case "evaluate":
                stages[name] = _evaluate(config, stages["train"])
            case "report":
                stages[name] = _report(
                    config, stages["evaluate"], time.perf_counter() if started is None else started
                )
    return list(stages.values())


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
            number, worker, arguments = (
                len(url_source.read_list(source.urls)),
                url_source.UrlListWorker,
                {"config": source.urls},
            )
            fields = _flatten(source.urls.model_dump(mode="json", exclude={"path"}), "source.urls.")
            fields["source.urls.path"] = digests.file(source.urls.path)
    fields |= {"source.kind": source.kind, "source.shard_size": source.shard_size}
    starts = range(0, number, source.shard_size)
    jobs = tuple(
        ShardJob(shard_name(index), "", {}, {"start": start, "stop": min(start + source.shard_size, number)})
        for index, start in enumerate(starts)
    )
    return ShardStage("source", fields, (), worker, arguments, source.actors, jobs)


def _ingest(config: WorkflowConfig, source: Stage) -> ShardStage:
    folder = config.root / "source"

    @contextmanager
    def surround() -> Iterator[dict[str, Any]]:
        if config.source.kind == "urls":
            yield {}
        else:
            with scenes_source.serve(folder, config.source.port) as address:
                yield {"base_url": address}

    arguments = {"source": folder, "config": config.ingest}
    fields = ingest.fingerprint_fields(config.ingest)
    return ShardStage(
        "ingest", fields, (source,), ingest.IngestWorker, arguments, config.ingest.actors, surround=surround
    )


def _latents(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    encoder = config.train.model.encoder
    digest = digests.folder(encoder.path, "train.model.encoder.path")

    def finish(folder: Path, sidecars: Sequence[Sidecar]) -> list[str]:
        latents.merge_statistics(folder, sidecars, folder / STATISTICS)
        return [STATISTICS]

    arguments = {
        "source": config.root / "curate",
        "config": config.latents,
        "encoder": encoder.path,
        "layer": encoder.layer,
    }
    fields = latents.fingerprint_fields(digest, encoder.layer)
    return ShardStage(
        "latents", fields, (images,), latents.LatentsWorker, arguments, config.latents.actors, finish=finish
    )


def _features(config: WorkflowConfig, images: Stage, digests: Digests) -> ShardStage:
    model = config.train.model
    digest = digests.folder(model.mllm, "train.model.mllm")
    arguments = {
        "source": config.root / "curate",
        "config": config.features,
        "mllm": model.mllm,
        "mllm_dtype": model.mllm_dtype,
    }
    fields = features.fingerprint_fields(digest, model.mllm_dtype)
    return ShardStage(
        "features", fields, (images,), features.FeaturesWorker, arguments, config.features.actors
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
    upstream = [stages["curate"], stages["latents"]]
    if config.train.data.text is not None and "features" in stages:
        upstream.append(stages["features"])

    def execute(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
        from pipelines.train import run_train

        return run_train(config)

    return WholeStage("train", fields, tuple(upstream), execute)


def _evaluate(config: WorkflowConfig, train: Stage) -> WholeStage:
    def execute(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
        from pipelines.evaluate import run_evaluate

        return run_evaluate(config)

    values = {**config.evaluate.scoring.model_dump(mode="json"), "every_steps": config.evaluate.every_steps}
    fields = _flatten(values, "evaluate.")
    return WholeStage("evaluate", fields, (train,), execute)


def _report(config: WorkflowConfig, evaluate: Stage, started: float) -> WholeStage:
    def execute(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
        from pipelines.report import write_report

        # the page shows the summary; its own seconds are added when the run ends
        write_summary(config.root, manifests, time.perf_counter() - started)
        write_report(config.root)
        return {}

    outputs = (config.root / "report.html", config.root / "gallery.png")
    return WholeStage("report", {}, (evaluate,), execute, outputs, needs_ray=False)
