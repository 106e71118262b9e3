"""Final checkpoints -> scores against the number of sampling steps: `python -m pipelines.ladder compute`."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipelines.ladder.config import LadderConfig
from pipelines.ladder.data import prepare
from pipelines.ladder.results import ComputePoint, append, finished, read
from pipelines.ladder.schedule import resources_of
from pipelines.ladder.task import Task, tasks_of
from pipelines.ladder.worker import hardware, now
from pipelines.runtime.session import brief, ray_session
from pipelines.runtime.tasks import run_on_ray
from pipelines.workflow.locks import locked_roots
from repfusion.evaluation.record import EvaluationConfig
from repfusion.runs.folder import RunFolder


@dataclass(frozen=True)
class Sampling:
    """One point: a run's final checkpoint and how to sample from it."""

    task: Task
    evaluation: EvaluationConfig

    @property
    def checkpoint(self) -> Path:
        from repfusion.runs.folder import checkpoint_folder

        return checkpoint_folder(RunFolder(self.task.train.output_dir).checkpoints, self.task.train.num_steps)

    @property
    def key(self) -> tuple[object, ...]:
        return *self.task.key, self.evaluation.sampler.num_steps, self.evaluation.max_items


def run_sampling(sampling: Sampling) -> str:
    """The point as JSON; in a process of its own."""
    import os

    import torch

    from repfusion.evaluation.checkpoints import evaluate_checkpoint
    from repfusion.flops import sample_flops
    from repfusion.model.meta import meta_from_config

    task, config = sampling.task, sampling.evaluation
    os.chdir(task.directory)
    if not torch.cuda.is_available():
        torch.set_num_threads(task.train.engine.num_threads or 1)
    out = task.train.output_dir / "compute" / f"steps_{config.sampler.num_steps}"
    evaluation = evaluate_checkpoint(sampling.checkpoint, out, config)
    found = evaluation.first
    generator = meta_from_config(task.train.model)
    return ComputePoint(
        **task.identity,
        time=now(),
        num_steps=config.sampler.num_steps,
        score=found.scores.headline_value,
        num_prompts=found.num_items,
        flops_per_image=sample_flops(generator, task.prompt_tokens, config.sampler),
        seconds=evaluation.seconds,
        hardware=hardware(),
    ).model_dump_json()


def run_compute(config: LadderConfig, say: Callable[[str], None] = print) -> int:
    """Samples what has no result yet, of the rows in `compute.rows` whose final checkpoint is on this
    machine; returns how many failed.

    Raises:
        ValueError: weights are missing, or another run is at work under this root.
        StageError: the data could not be made, or Ray died.
    """
    if not config.sampled_again:
        say(f"the plan {config.plan} samples no rows again; compute.rows names some")
        return 0
    wanted = config.model_copy(update={"rows": config.sampled_again})
    rows = [config.compared.rows[name] for name in wanted.rows]
    with ExitStack() as session:
        session.enter_context(locked_roots(config.root / config.name))
        columns = prepare(config, rows, lambda line: say(f"data: {line}"))
        samplings = [
            Sampling(task, _evaluation(config, num_steps))
            for task in tasks_of(wanted, columns)
            for num_steps in config.compute.num_steps
        ]
        there = [one for one in samplings if one.checkpoint.is_dir()]
        if absent := sorted(
            {f"{one.task.row} seed {one.task.seed}" for one in samplings if one not in there}
        ):
            say(f"no final checkpoint on this machine of {', '.join(absent)}: 'run' makes it")
        done = finished(read(config.compute_results, ComputePoint))
        todo = [one for one in there if one.key not in done]
        say(f"{len(there)} points, {len(there) - len(todo)} of them done before")
        if not todo:
            return 0
        session.enter_context(ray_session(config.ray))
        failed = 0
        for one, outcome in run_on_ray(run_sampling, todo, resources_of(config.resources)):
            point = _point(one, outcome)
            append(config.compute_results, point)
            failed += point.status == "failed"
            what = f"FAILED: {point.error}" if point.error else f"{point.score:.3f}"
            say(f"{one.task.row} seed {one.task.seed}, {point.num_steps} sampling steps: {what}")
    return failed


def _evaluation(config: LadderConfig, num_steps: int) -> EvaluationConfig:
    final = config.scoring.final
    sampler = final.sampler.model_copy(update={"num_steps": num_steps})
    return final.model_copy(update={"max_items": config.compute.num_prompts, "sampler": sampler})


def _point(one: Sampling, outcome: str | Exception) -> ComputePoint:
    if isinstance(outcome, str):
        return ComputePoint.model_validate_json(outcome)
    return ComputePoint(
        **one.task.identity,
        status="failed",
        error=brief(outcome),
        time=now(),
        num_steps=one.evaluation.sampler.num_steps,
        num_prompts=one.evaluation.max_items or 0,
    )
