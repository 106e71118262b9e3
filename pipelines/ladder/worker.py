"""One run: training, scores of each checkpoint, its line of the results. Its process ends with it, and so its
group of ranks, which is not left before.
"""

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pipelines.ladder.results import CheckpointScores, Result
from pipelines.ladder.task import Task
from repfusion.files import write_json
from repfusion.runs.folder import RunFolder

RECORD = "result.json"
"""File in the run's folder, written when all is done: what was appended to the results, or should have
been.
"""


def run_task(task: Task) -> str:
    """The result as JSON. Resumes where an earlier attempt was cut short; what is done is not done again.

    Raises:
        ValueError: data, weights or model do not fit. NonFiniteError, CheckpointError: as the training does.
    """
    from repfusion.runs.checkpoint import prune

    os.chdir(task.directory)
    record = task.train.output_dir / RECORD
    if record.exists() and (known := Result.model_validate_json(record.read_text())).key == task.key:
        return known.model_dump_json()
    summary = _train(task)
    started = time.perf_counter()
    points = _score(task)
    result = _result(task, summary, points, time.perf_counter() - started)
    _track(task, result)
    write_json(record, result.model_dump(mode="json"))
    # only the last one's weights stay; before the record, a kill would leave nothing to resume from
    prune(RunFolder(task.train.output_dir).checkpoints, keep_resume=0, keep_last=1)
    return result.model_dump_json()


def _train(task: Task) -> dict[str, Any]:
    from repfusion.train import train
    from repfusion.training.meters import Report

    path = RunFolder(task.train.output_dir).progress
    task.train.output_dir.mkdir(parents=True, exist_ok=True)

    def on_report(report: Report) -> None:
        write_json(path, {"step": report.step, "samples_per_sec": report.samples_per_sec})

    try:
        return train(task.train, on_report=on_report)
    finally:
        path.unlink(missing_ok=True)


def _score(task: Task) -> list[CheckpointScores]:
    """Scores of every checkpoint."""
    import torch

    from pipelines.evaluation.records import finished
    from repfusion.evaluation.checkpoints import evaluate_checkpoint
    from repfusion.runs.folder import complete_checkpoints, step_of

    if not torch.cuda.is_available():
        torch.set_num_threads(task.train.engine.num_threads or 1)
    checkpoints = RunFolder(task.train.output_dir).checkpoints
    points = []
    for folder in complete_checkpoints(checkpoints):
        step = step_of(folder)
        config = task.final if step == task.train.num_steps else task.curve
        out = RunFolder(task.train.output_dir).evaluations / folder.name
        evaluation = finished(out, config) or evaluate_checkpoint(folder, out, config)
        found = evaluation.first
        points.append(
            CheckpointScores(
                step=step,
                headline=found.scores.headline,
                values=found.scores.values,
                num_prompts=found.num_items,
                validation_loss=validation_loss(folder, task),
            )
        )
    return points


def validation_loss(checkpoint: Path, task: Task) -> float:
    """Mean squared error of the velocity on held-out scenes. Scene i has the same caption, noise level and
    noise for every checkpoint whose latents have this shape.
    """
    import numpy as np
    import torch

    from repfusion.diffusion.flow import draw, interpolate, velocity
    from repfusion.request import Request
    from repfusion.runs.checkpoint import load_checkpoint
    from repfusion.scenes.rewriting import CaptionWording, caption_in
    from repfusion.scenes.world import WorldConfig, draw_scene, render

    drawn, num_scenes = WorldConfig.model_validate(task.world), task.num_validation
    scenes = [draw_scene(seed, drawn, "held_out") for seed in range(num_scenes)]
    wording = cast(CaptionWording, task.wording)
    captions = [caption_in(scene, np.random.default_rng([i, 1]), wording) for i, scene in enumerate(scenes)]
    model = load_checkpoint(checkpoint)
    encoder = model.config.encoder.load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    every_t, every_noise = draw(range(num_scenes), model.latent_shape, model.shift)
    losses = []
    with torch.no_grad():
        for part in torch.arange(num_scenes).split(64):
            rows = part.tolist()
            pixels = torch.from_numpy(np.stack([render(scenes[i], drawn) for i in rows]))
            latents = model.normalise(encoder(pixels).to(device))
            noise, t = every_noise[part].to(device), every_t[part].to(device)
            prompted = model.read([Request(captions[i]) for i in rows], ["full"] * len(rows))
            predicted = model.velocity(interpolate(latents, noise, t), t, prompted).float()
            losses.append((predicted - velocity(latents, noise)).square().mean(dim=(1, 2)).cpu())
    return float(torch.cat(losses).mean())


def hardware() -> str:
    """The GPU, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.split(":", 1)[1] for line in info.read_text().splitlines() if "model name" in line]
        found = named[0].strip() if named else found
    return f"1 core of {os.cpu_count()}, {found}"


def _result(task: Task, summary: dict[str, Any], points: list[CheckpointScores], score_sec: float) -> Result:
    from repfusion.flops import sample_flops
    from repfusion.lineage import environment
    from repfusion.model.meta import meta_from_config

    model = meta_from_config(task.train.model)
    return Result(
        **task.identity,
        time=now(),
        settings=task.settings,
        weights=task.weights,
        points=tuple(points),
        samples_per_sec=summary["samples_per_sec"],
        final_loss=summary["final_loss"],
        train_sec=task.train.num_steps * task.train.global_batch_size / summary["samples_per_sec"],
        score_sec=score_sec,
        flops_per_image=sample_flops(model, task.prompt_tokens, task.final.sampler),
        trainable_parameters=sum(p.numel() for p in model.trainable_state().values()),
        dit=task.train.model.dit.model_dump(mode="json"),
        hardware=hardware(),
        commit=environment.git_commit(),
        local_changes=environment.has_local_changes(),
        run_id=summary["run_id"],
    )


def _track(task: Task, result: Result) -> None:
    """Scores by step, in the training's own MLflow run."""
    if result.run_id is None:
        return
    from repfusion.evaluation.record import GALLERY
    from repfusion.tracking import Tracker

    config = task.train.tracking.model_copy(update={"run_id": result.run_id})
    tracker = Tracker(config, attach=True)
    for point in result.points:
        named = {f"eval/{name}": value for name, value in point.values.items()}
        tracker.log_metrics({**named, "ladder/validation_loss": point.validation_loss}, point.step)
        if point is not result.points[-1]:
            tracker.forget_checkpoint(point.step)
    for name, value in {
        "ladder.row": result.row,
        "ladder.in": ", ".join(task.ladders) or "none",
        "ladder.budget": f"{result.budget_name} {result.budget[:8]}",
    }.items():
        tracker.set_tag(name, value)
    evaluations = sorted(RunFolder(task.train.output_dir).evaluations.glob("step_*"))
    if evaluations:
        tracker.log_image(evaluations[-1] / GALLERY, "gallery", result.points[-1].step)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
