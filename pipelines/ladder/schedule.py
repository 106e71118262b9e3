"""Tasks -> Ray: as many at once as there are CPUs or GPUs; or one by one without it. Results are appended as
they come.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection

from pipelines.ladder.config import LadderConfig, ResourcesConfig
from pipelines.ladder.data import prepare
from pipelines.ladder.results import Result, append, finished, read
from pipelines.ladder.task import Task, tasks_of
from pipelines.ladder.worker import now, run_task
from pipelines.runtime.session import brief, ray_session
from pipelines.runtime.tasks import run_on_ray
from pipelines.workflow.locks import locked_roots
from repfusion.runs.folder import RunFolder
from repfusion.tracking import prepare_store

GPU_SHARE = 1 / 12


def run_ladder(config: LadderConfig, say: Callable[[str], None] = print) -> int:
    """Brings data and results up to date: runs what has no result yet, and what failed. Returns how many
    failed; each is a line of the results with its error.

    Raises:
        ValueError: weights are missing, or another run is at work under this root.
        StageError: the data could not be made, or Ray died.
    """
    rows = [config.compared.rows[name] for name in config.chosen]
    with ExitStack() as session:
        session.enter_context(locked_roots(config.root / config.name))
        columns = prepare(config, rows, lambda line: say(f"data: {line}"))
        tasks = tasks_of(config, columns)
        done = finished(read(config.results, Result))
        todo = [task for task in tasks if task.key not in done]
        say(f"{len(tasks)} runs, {len(tasks) - len(todo)} of them done before")
        if not todo:
            return 0
        if not config.resources.one_by_one:
            session.enter_context(ray_session(config.ray))
        if config.tracking_uri is not None:
            prepare_store(config.tracking_uri, todo[0].train.tracking.experiment)
        for task in todo:  # what a killed run said of itself is not so any more
            RunFolder(task.train.output_dir).progress.unlink(missing_ok=True)
        failed, started = 0, time.perf_counter()
        by_key = {task.key: task for task in todo}
        outcomes = _outcomes(config.resources, todo, say)
        for number, (task, outcome) in enumerate(outcomes, 1):
            result = _result(by_key[task.key], outcome)
            append(config.results, result)
            failed += result.status == "failed"
            what = f"FAILED: {result.error}" if result.error else f"{result.score:.3f}"
            minutes = (time.perf_counter() - started) / 60
            say(f"{task.row} seed {task.seed}: {what} ({number} of {len(todo)}, {minutes:.1f} minutes)")
    return failed


def _outcomes(
    config: ResourcesConfig, todo: Sequence[Task], say: Callable[[str], None]
) -> Iterator[tuple[Task, str | Exception]]:
    if config.one_by_one:
        return run_one_by_one(todo)
    return iter(run_on_ray(run_task, todo, resources_of(config), lambda left: say_progress(left, say)))


def run_one_by_one(tasks: Sequence[Task]) -> Iterator[tuple[Task, str | Exception]]:
    """Each task with its result as JSON, or what went wrong. The processes end with this one."""
    context = get_context("spawn")
    for task in tasks:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        try:
            outcome = ours.recv()
        except EOFError:
            process.join()
            outcome = RuntimeError(f"the run's process died with exit code {process.exitcode}")
        process.join()
        yield task, outcome


def _answer(pipe: Connection, task: Task) -> None:
    try:
        pipe.send(run_task(task))
    except Exception as error:  # noqa: BLE001  a run that fails is a line of the results and stops no other
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _result(task: Task, outcome: str | Exception) -> Result:
    if isinstance(outcome, str):
        return Result.model_validate_json(outcome)
    return Result(
        **task.identity,
        status="failed",
        error=brief(outcome),
        time=now(),
        settings=task.settings,
        weights=task.weights,
    )


def resources_of(config: ResourcesConfig) -> dict[str, float]:
    """What one run reserves, by Ray's names."""
    import ray

    share = config.num_gpus
    if share is None:
        share = GPU_SHARE if ray.cluster_resources().get("GPU", 0) else 0
    return {"num_cpus": config.num_cpus, **({"num_gpus": share} if share else {})}


def say_progress(left: Sequence[Task], say: Callable[[str], None]) -> None:
    """A line about the runs that train."""
    shown = []
    for task in left:
        path = RunFolder(task.train.output_dir).progress
        if path.exists():
            report = json.loads(path.read_text())
            rate = f"{report['samples_per_sec']:.0f} samples/s"
            shown.append(
                f"{task.row} seed {task.seed} step {report['step']}/{task.train.num_steps} at {rate}"
            )
    if shown:
        say(f"  {'; '.join(shown)}")
