"""The ranks of a training: Ray Train starts them, `repfusion.train` does the work.

Checkpoints are the folders that `repfusion.train` writes; Ray Train is told metrics alone. A rank that dies
restarts all of them, on as many nodes as are left, from the last complete checkpoint.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from pipelines.runtime.progress import TrainingProgress
from pipelines.runtime.session import PATIENCE_SEC, StageError, brief, check_ray_lives
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from repfusion.files import write_json
from repfusion.runs.folder import RunFolder, latest_checkpoint, step_of
from repfusion.train import TrainConfig, TrainingStopped
from repfusion.training.engine import NonFiniteError
from repfusion.training.meters import Report
from repfusion.training.snapshot import CheckpointError

STOP_POLL_SEC = 1.0
STOP_PATIENCE_SEC = 600.0
"""How long a driver that is to end waits for that checkpoint: ranks may be gone, or hang."""
AT_ONCE = "at once"
"""What stands in the file that asks for a checkpoint where the ranks are to end without one."""
LOOK_SEC = 0.5
"""Between a rank's looks for that."""
END_PATIENCE_SEC = 20.0
"""How long a driver then waits for the ranks."""
STEP_SEC = 1.0
"""How often rank 0 writes down which step it is at, from the first one on."""


def train_rank(launch: dict[str, Any]) -> None:
    """What each rank runs. Ray Train has said who the ranks are and changed the working directory."""
    from ray import train as ray_train

    from pipelines.runtime.metrics import TrainingMetrics, to_ray
    from repfusion.train import train
    from repfusion.training.distributed import init_process_group, prepare_environment

    os.chdir(launch["directory"])
    config: TrainConfig = launch["config"]
    rank = ray_train.get_context().get_world_rank()
    stop, asked = RunFolder(config.output_dir).stop, [0.0]
    metrics = TrainingMetrics(to_ray(), config.output_dir)

    latest: dict[str, Any] = {}
    written = [0.0]

    def on_step(step: int) -> None:
        if rank == 0 and time.monotonic() - written[0] >= STEP_SEC:
            written[0] = time.monotonic()
            write_json(RunFolder(config.output_dir).progress, {**latest, "step": step})

    def on_report(report: Report) -> None:
        if rank == 0:
            latest.update(vars(report))
            write_json(RunFolder(config.output_dir).progress, latest)
            metrics.report(report)

    def on_checkpoint(folder: Path, step: int, seconds: float) -> None:
        if rank == 0:
            metrics.checkpoint(seconds)
        # A barrier: every rank reports, every time.
        ray_train.report({"step": step, "checkpoint": str(folder)})

    def should_stop() -> bool:
        if rank or time.monotonic() - asked[0] < STOP_POLL_SEC:
            return False
        asked[0] = time.monotonic()
        return stop.exists()

    def warn(text: str) -> None:
        with RunFolder(config.output_dir).warnings.open("a") as file:
            file.write(f"{text}\n")

    end_when_told(stop)
    try:
        prepare_environment()
        init_process_group(launch["backend"])
        for column, copy in launch["columns"]:
            mirror(column, copy)
        train(config, on_checkpoint, on_report, should_stop, warn, on_step)
    except TrainingStopped:
        return
    except (ValueError, NonFiniteError, CheckpointError) as error:
        raise StageError(f"rank {rank}: {type(error).__name__}: {error}") from error


@contextmanager
def progress_bar(config: TrainConfig) -> Iterator[None]:
    """Shows on the driver what rank 0 last reported: a bar on a terminal, a line now and then elsewhere; and
    its warnings. Within a session of Ray: Prometheus is told how many steps are left.
    """
    from pipelines.runtime.metrics import TrainingMetrics, to_ray

    metrics = TrainingMetrics(to_ray(), config.output_dir)
    path, stopped, warnings = RunFolder(config.output_dir).progress, Event(), Warnings(config.output_dir)
    path.unlink(missing_ok=True)
    last = latest_checkpoint(RunFolder(config.output_dir).checkpoints)
    first_step = 0 if last is None else step_of(last)
    metrics.left(config.num_steps - first_step)

    def watch() -> None:
        with TrainingProgress(first_step, config.num_steps) as progress:
            while not stopped.wait(0.5):
                warnings.show()
                if path.exists() and progress.show(json.loads(path.read_text())):
                    metrics.left(config.num_steps - progress.step)

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        warnings.show()
        metrics.left(0)


class Warnings:
    """Lines that rank 0 adds to a file, each shown once on the driver."""

    def __init__(self, output_dir: Path):
        self.path, self.shown = RunFolder(output_dir).warnings, 0
        self.path.unlink(missing_ok=True)

    def show(self) -> None:
        with suppress(FileNotFoundError):
            lines = self.path.read_text().splitlines()
            for line in lines[self.shown :]:
                tqdm.write(f"train: warning: {line}")
            self.shown = len(lines)


def base_of(error: Exception) -> BaseException:
    """What happened on a rank, out of Ray Train's wrappers."""
    return getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error


def end_of_restarts(stop: Path) -> Any:
    """A callback of Ray Train: an error that a restart would only repeat, and ranks that were told to end at
    once, end the training.
    """
    from ray.train import UserCallback

    class EndOfRestarts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if ends_at_once(stop):
                raise StageError("stopped at once")
            for error in worker_exceptions.values():
                if isinstance(base := base_of(error), StageError):
                    # Ray Train repeats what fails on ranks, not what fails in its callbacks.
                    raise base

    return EndOfRestarts()


def ends_at_once(stop: Path) -> bool:
    """Whether a second interrupt came: the file that asks for a checkpoint says so."""
    try:
        return stop.read_text() == AT_ONCE
    except FileNotFoundError:
        return False


def end_when_told(stop: Path) -> None:
    """Ends this rank where it is when a second interrupt comes, whatever it waits for."""

    def watch() -> None:
        while not ends_at_once(stop):
            time.sleep(LOOK_SEC)
        os._exit(1)

    Thread(target=watch, name="end when told", daemon=True).start()


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
    from ray.train.torch import TorchTrainer

    from pipelines.runtime.group import RankConfig

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
    RunFolder(config.output_dir).stop.unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={
            "config": config,  # itself: pickled from memory to memory, with what it may not write
            "directory": os.getcwd(),
            "columns": list(columns),
            "backend": "nccl" if use_gpu else "gloo",
        },
        torch_config=RankConfig(),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=None),
        run_config=RunConfig(
            # A name of its own: under an old one Ray Train would look for its own checkpoints.
            name=f"{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[end_of_restarts(RunFolder(config.output_dir).stop.resolve())],
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
        interrupt = wait(ended, RunFolder(output_dir).stop)
    finally:
        RunFolder(output_dir).stop.unlink(missing_ok=True)
    if failed:
        raise StageError(f"train: {first_failure(failed[0])}") from failed[0]
    if interrupt is not None:
        raise interrupt


def wait(ended: Event, stop: Path) -> KeyboardInterrupt | None:
    """Returns when the ranks have ended, with the interrupt that made them. At the second one, or where no
    checkpoint comes, the ranks end at once, and the interrupt is raised.
    """
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
                end_at_once(ended, stop)
                raise
            interrupt, asked = error, time.monotonic()
            stop.touch()
            print(
                "train: stopping after a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True
            )
        if interrupt is not None and time.monotonic() - asked > STOP_PATIENCE_SEC:
            print(f"train: no checkpoint in {STOP_PATIENCE_SEC:g} s", file=sys.stderr, flush=True)
            end_at_once(ended, stop)
            raise interrupt
    return interrupt


def end_at_once(ended: Event, stop: Path) -> None:
    """Tells the ranks to end, and waits for it a little: Ray ends the whole process, with a status of its
    own, where it is shut down while a thread still waits in it.
    """
    stop.write_text(AT_ONCE)
    ended.wait(END_PATIENCE_SEC)
