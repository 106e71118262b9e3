"""The train stage: Ray Train starts the ranks, `repfusion.train` does the work, evaluations run beside it.

Checkpoints are the folders that `repfusion.train` writes; Ray Train is told metrics alone. A rank that dies
restarts all of them, on as many nodes as are left, from the last complete checkpoint.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pydantic import Field, model_validator
from tqdm import tqdm

from pipelines.dag import Place, ShardStage, Stage, WholeStage
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.session import (
    PATIENCE_SEC,
    RayConfig,
    StageError,
    brief,
    check_ray_lives,
    ray_session,
)
from pipelines.shards.manifest import MANIFEST, Upstream
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from pipelines.workflow.digests import Digests, flatten
from repfusion.config import weights_of
from repfusion.data.columns import manifest_digest
from repfusion.data.config import CAPTIONS, DataConfig
from repfusion.files import write_json
from repfusion.model.build import columns_of
from repfusion.runs.checkpoint import complete_checkpoints, latest_checkpoint, step_of
from repfusion.tracking import prepare_store
from repfusion.train import TrainConfig, TrainingStopped
from repfusion.training.engine import NonFiniteError, grad_accum_steps
from repfusion.training.meters import Report
from repfusion.training.snapshot import CheckpointError

NOT_BYTES = (
    "output_dir",
    "data",
    "tracking",
    "keep_resume",
    "keep_last",
    "keep_every_steps",
    "log_every_steps",
)
"""Fields of the training that do not change its weights."""
ROUNDING = (
    "zero_stage",
    "frozen",
    "offload_optimizer",
    "activation_checkpointing",
    "compile",
    "micro_batch_size",
    "attention",
    "num_threads",
)
"""Fields of its `engine` by which its weights differ in rounding alone, as they do by the number of ranks:
a training goes on from its checkpoint on other hardware.
"""
REFERENCE = re.compile(r"stage:(?P<stage>[^/]+)(?:/(?P<step>step_\d+))?")
STOP = "stop"
"""Made by the driver for the ranks to write a checkpoint and end."""
STOP_POLL_SEC = 1.0
STOP_PATIENCE_SEC = 600.0
"""How long a driver that is to end waits for that checkpoint: ranks may be gone, or hang."""
PROGRESS = "progress.json"
LINE_SEC = 15.0
"""Between lines of progress where the terminal shows no bar."""


@dataclass(frozen=True)
class Reference:
    """Something of a stage of the same workflow, which may not exist yet: a training's last checkpoint,
    `stage:NAME`, a certain one, `stage:NAME/step_00000500`, or a column, `stage:NAME`.
    """

    stage: str
    step: str | None

    @classmethod
    def of(cls, path: Any) -> "Reference | None":
        """None for a folder."""
        found = REFERENCE.fullmatch(str(path))
        return None if found is None else cls(found["stage"], found["step"])


class TrainingConfig(TrainConfig):
    """A training of a workflow."""

    num_workers: int | tuple[int, int] = 2
    """Data-parallel ranks; [least, most] takes as many as the cluster has room for, and goes on with fewer
    after a node was lost. Each number in between has to divide the global batch. Changes rounding alone.
    """
    max_failures: int = Field(default=3, ge=1)
    """How often the ranks start again from the last checkpoint, after one died, before the stage fails.
    Changes no bytes.
    """

    def plain(self, places: Path) -> TrainConfig:
        """What the ranks are given; `places` holds the folders of the workflow's images and columns."""
        fields = {name: getattr(self, name) for name in TrainConfig.model_fields}

        def folder(path: Path) -> Path:
            return path if (reference := Reference.of(path)) is None else places / reference.stage

        columns = {kind: folder(path) for kind, path in self.data.columns.items()}
        update = {"images": folder(self.data.images), "columns": columns}
        return TrainConfig(**{**fields, "data": self.data.model_copy(update=update)})

    @property
    def columns_read(self) -> dict[str, str]:
        """Names of the workflow's columns that the training reads, by kind."""
        found = {kind: Reference.of(path) for kind, path in self.data.columns.items()}
        return {kind: one.stage for kind, one in found.items() if one is not None}

    @property
    def readable(self) -> set[str]:
        """Kinds of columns that the training can read."""
        return {CAPTIONS, *columns_of(self.model)}

    @model_validator(mode="after")
    def _ranks_divide(self) -> "TrainingConfig":
        """A rank's share of the global batch is whole micro-batches."""
        workers = self.num_workers
        least, most = (workers, workers) if isinstance(workers, int) else workers
        if not 1 <= least <= most:
            raise ValueError(f"num_workers is {workers}, expected 1 <= least <= most")
        for world_size in range(least, most + 1):
            grad_accum_steps(self.global_batch_size, self.engine.micro_batch_size, world_size)
        return self


def train_rank(launch: dict[str, Any]) -> None:
    """What each rank runs. Ray Train has set up the process group and changed the working directory."""
    from ray import train as ray_train

    from repfusion.train import train

    os.chdir(launch["directory"])
    config = TrainConfig.model_validate(launch["config"])
    rank = ray_train.get_context().get_world_rank()
    stop, asked = config.output_dir / STOP, [0.0]

    def on_report(report: Report) -> None:
        if rank == 0:
            write_json(config.output_dir / PROGRESS, vars(report))

    def on_checkpoint(folder: Path, step: int) -> None:
        # A barrier: every rank reports, every time.
        ray_train.report({"step": step, "checkpoint": str(folder)})

    def should_stop() -> bool:
        if rank or time.monotonic() - asked[0] < STOP_POLL_SEC:
            return False
        asked[0] = time.monotonic()
        return stop.exists()

    try:
        for column, copy in launch["columns"]:
            mirror(column, copy)
        train(config, on_checkpoint, on_report, should_stop)
    except TrainingStopped:
        return
    except (ValueError, NonFiniteError, CheckpointError) as error:
        raise StageError(f"rank {rank}: {type(error).__name__}: {error}") from error


@contextmanager
def progress_bar(config: TrainConfig) -> Iterator[None]:
    """Shows on the driver what rank 0 last reported: a bar on a terminal, a line now and then elsewhere."""
    path, stopped = config.output_dir / PROGRESS, Event()
    path.unlink(missing_ok=True)
    last = latest_checkpoint(config.output_dir / "checkpoints")
    first_step = 0 if last is None else step_of(last)
    is_terminal = sys.stderr.isatty()

    def watch() -> None:
        shown, printed = first_step, time.monotonic()
        with tqdm(
            total=config.num_steps, initial=first_step, desc="train", unit="step", disable=not is_terminal
        ) as bar:
            while not stopped.wait(0.5):
                if not path.exists():
                    continue
                report = json.loads(path.read_text())
                if report["step"] == shown:
                    continue
                bar.update(report["step"] - shown)
                bar.set_postfix(
                    loss=f"{report['loss']:.4f}", samples_per_sec=f"{report['samples_per_sec']:.0f}"
                )
                shown = report["step"]
                if not is_terminal and time.monotonic() - printed > LINE_SEC:
                    printed = time.monotonic()
                    print(
                        f"train: step {shown}/{config.num_steps}, loss {report['loss']:.4f}, "
                        f"{report['samples_per_sec']:.0f} samples/s",
                        flush=True,
                    )

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def base_of(error: Exception) -> BaseException:
    """What happened on a rank, out of Ray Train's wrappers."""
    return getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error


def end_of_restarts() -> Any:
    """A callback of Ray Train: an error that a restart would only repeat ends the training."""
    from ray.train import UserCallback

    class EndOfRestarts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(base := base_of(error), StageError):
                    # Ray Train repeats what fails on ranks, not what fails in its callbacks.
                    raise base

    return EndOfRestarts()


def first_failure(error: Exception) -> str:
    """One line for the rank that failed first, without Ray's tracebacks."""
    if (ended := getattr(error, "controller_failure", None)) is not None:
        return str(ended) if isinstance(ended, StageError) else brief(ended)
    failures = {rank: base_of(one) for rank, one in sorted(getattr(error, "worker_failures", {}).items())}
    # Ranks that lose their peer say only that the connection was closed, or reset.
    own = {rank: one for rank, one in failures.items() if " by peer" not in str(one)}
    for rank, one in (own or failures).items():
        return f"rank {rank}: {brief(one)}"
    return str(error)


def launch(
    config: TrainConfig,
    num_workers: int | tuple[int, int],
    columns: Sequence[tuple[Folder, Path]] = (),
    max_failures: int = 1,
) -> None:
    """Runs the training on `num_workers` ranks, one GPU each where the cluster has as many, else one CPU
    each; given a least and a largest number, on as many as there is room for, also after a node was lost.
    Remote `columns` are copied to each machine first.

    Raises:
        ValueError: the cluster has fewer CPUs than ranks.
        StageError: a rank met an error that a restart would repeat, or failed more than max_failures times.
        KeyboardInterrupt: after the checkpoint that the first one asked for; at once at the second.
    """
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least = num_workers if isinstance(num_workers, int) else num_workers[0]
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) >= least
    if resources.get("CPU", 0) < least:
        raise ValueError(
            f"num_workers is {num_workers}, the cluster has {resources.get('CPU', 0):g} CPUs; "
            "lower it or raise ray.num_cpus"
        )
    # One machine: keep gloo off the network. A cluster chooses its interface itself.
    is_local = all(node["NodeManagerAddress"] == "127.0.0.1" for node in ray.nodes() if node["Alive"])
    environment = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"} if is_local else {}
    storage = (config.output_dir / "ray").resolve()
    storage.mkdir(parents=True, exist_ok=True)
    (config.output_dir / STOP).unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "directory": os.getcwd(),
            "columns": list(columns),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=None),
        run_config=RunConfig(
            # A name of its own: under an old one Ray Train would look for its own checkpoints.
            name=f"{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[end_of_restarts()],
            worker_runtime_env={"env_vars": environment},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    fit(trainer, config.output_dir)


def fit(trainer: Any, output_dir: Path) -> None:
    """Waits for the ranks to end; the first interrupt asks them to."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    failed: list[TrainingFailedError | RayError] = []
    ended = Event()

    def run() -> None:
        try:
            trainer.fit()
        except (TrainingFailedError, RayError) as error:
            failed.append(error)
        finally:
            ended.set()

    # In a thread: in the main one Ray Train would answer Ctrl-C by ending the ranks where they are.
    Thread(target=run, name="fit", daemon=True).start()
    try:
        interrupt = wait(ended, output_dir / STOP)
    finally:
        (output_dir / STOP).unlink(missing_ok=True)
    if failed:
        raise StageError(f"train: {first_failure(failed[0])}") from failed[0]
    if interrupt is not None:
        raise interrupt


def wait(ended: Event, stop: Path) -> KeyboardInterrupt | None:
    """Returns when the ranks have ended, with the interrupt that made them; raises the second one at once."""
    interrupt, asked, looked = None, 0.0, time.monotonic()
    # Not by Thread.join: interrupted, it takes the thread for ended.
    while not ended.is_set():
        try:
            ended.wait(1.0)
            if time.monotonic() - looked > PATIENCE_SEC:
                check_ray_lives()
                looked = time.monotonic()
        except StageError as error:
            raise interrupt or error from error
        except KeyboardInterrupt as error:
            if interrupt is not None:
                raise
            interrupt, asked = error, time.monotonic()
            stop.touch()
            print(
                "train: stopping after a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True
            )
        if interrupt is not None and time.monotonic() - asked > STOP_PATIENCE_SEC:
            print(f"train: no checkpoint in {STOP_PATIENCE_SEC:g} s", file=sys.stderr, flush=True)
            raise interrupt
    return interrupt


def run_train(
    config: TrainConfig,
    num_workers: int | tuple[int, int],
    max_failures: int,
    columns: Sequence[tuple[Folder, Path]],
    evaluate: EvaluateConfig | None,
    ray: RayConfig,
) -> dict[str, Any]:
    """Trains to the end, resuming from the last complete checkpoint; returns what train.json says. With
    `evaluate`, checkpoints are scored beside it.

    Raises:
        ValueError: the cluster is too small for the ranks.
        StageError: the training failed; its checkpoints stay, and the next run resumes from the last.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if config.tracking.uri is not None:
        # Before any worker: two processes that first use a new SQLite file at the same time fail.
        prepare_store(config.tracking.uri, config.tracking.experiment, config.tracking.artifacts)
    beside = nullcontext() if evaluate is None else EvaluationScheduler(evaluate, config)
    with ray_session(ray), beside, progress_bar(config):
        launch(config, num_workers, columns, max_failures)
    return json.loads((config.output_dir / "train.json").read_text())


def fingerprint_fields(name: str, config: TrainConfig, digests: Digests) -> dict[str, Any]:
    """What decides the weights of the training of a name: the configuration, and the digests of the folders
    that it names. Raises ValueError, naming the config key, where one is missing.
    """
    prefix = f"trainings.{name}."
    values = config.model_dump(mode="json", include=TrainConfig.model_fields.keys() - set(NOT_BYTES))
    values["engine"] = {key: value for key, value in values["engine"].items() if key not in ROUNDING}
    fields = flatten(values, prefix)
    for key, folder in weights_of(config).items():
        is_made_here = Reference.of(folder) is not None
        fields[prefix + key] = str(folder) if is_made_here else digests.folder(folder, prefix + key)
    fields[f"{prefix}data.caption_weights"] = config.data.caption_weights
    for column, folder in config.data.folders.items():
        if Reference.of(folder) is None:
            fields[f"{prefix}data.{column}"] = manifest_digest(folder)
    return fields | _mixed_data(config.data, f"{prefix}data.")


def _mixed_data(data: DataConfig, prefix: str) -> dict[str, Any]:
    """How often the data sets mixed into the workflow's own are drawn, and the digests of their columns.
    Raises ValueError, naming the config key, where a column is not complete.
    """
    fields: dict[str, Any] = {}
    if data.mix and data.weight != 1:
        fields[f"{prefix}weight"] = data.weight
    for name, dataset in sorted(data.mix.items()):
        mix = f"{prefix}mix.{name}."
        fields[f"{mix}weight"] = dataset.weight
        fields[f"{mix}caption_weights"] = dataset.caption_weights
        for column, folder in dataset.folders.items():
            digest = fields[f"{mix}{column}"] = manifest_digest(folder)
            if digest is None:
                raise ValueError(
                    f"{mix}{column}: {folder} holds no complete stage (no {MANIFEST}); expected "
                    "a local folder that a workflow wrote: run that workflow to its end, or correct the path"
                )
    return fields


def train_stage(
    name: str,
    config: TrainingConfig,
    upstream: tuple[Stage, ...],
    start: Path | None,
    evaluate: EvaluateConfig | None,
    ray: RayConfig,
    place: Place,
) -> WholeStage:
    """The stage of a training.

    Args:
        name: of the stage and its folder.
        config: its section.
        upstream: the stages that it reads.
        start: output folder of the training that it goes on from, where `init_from` names one.
        evaluate: how its checkpoints are scored beside it; None does not.
        ray: the cluster.
        place: of the workflow.
    """

    def execute(above: Upstream) -> dict[str, Any]:
        plain = config.plain(place.columns)
        resolved = plain if start is None else started_from(plain, start)
        ranks = config.num_workers, config.max_failures
        return run_train(resolved, *ranks, remote_copies(upstream, place), evaluate, ray)

    fields = fingerprint_fields(name, config, place.digests)
    return WholeStage(name, fields, Folder(str(place.root / name)), upstream, execute)


def remote_copies(upstream: Sequence[Stage], place: Place) -> list[tuple[Folder, Path]]:
    """Columns that are not on local disk, each with the place of the copy that training reads."""
    if place.data.is_local:
        return []
    columns = (stage for stage in upstream if isinstance(stage, ShardStage))
    return [(stage.folder, place.columns / stage.name) for stage in columns]


def started_from(config: TrainConfig, base: Path) -> TrainConfig:
    """The training with the checkpoint that `init_from` stands for, of the training in the folder `base`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    reference, root = Reference.of(config.init_from), base / "checkpoints"
    assert reference is not None
    found = {path.name: path for path in complete_checkpoints(root)}
    chosen = found.get(reference.step or max(found, default=""))
    if chosen is None:
        wanted = reference.step or "checkpoint"
        raise ValueError(
            f"init_from is {config.init_from}, but {root} holds no complete {wanted}; it holds "
            f"{', '.join(found) or 'none'}"
        )
    return config.model_copy(update={"init_from": chosen})
