"""The folders of a workflow's trainings -> how far each is, for `status` and for whoever stopped it."""

import json
from contextlib import suppress

from repfusion.runs.folder import RunFolder, latest_checkpoint, step_of
from repfusion.train import TrainConfig


def saved_step(config: TrainConfig) -> int | None:
    """Step of the last checkpoint; None where there is none."""
    last = latest_checkpoint(RunFolder(config.output_dir).checkpoints)
    return None if last is None else step_of(last)


def how_far(config: TrainConfig, is_at_work: bool) -> str | None:
    """`step 42/600` of a training that has begun: at work, the step that it last wrote down; else the one
    that is saved, from which it goes on. None where it has not begun.
    """
    saved, now = saved_step(config), None
    if is_at_work:
        with suppress(OSError, ValueError, KeyError, TypeError):
            now = json.loads(RunFolder(config.output_dir).progress.read_text())["step"]
    if now is not None:
        return f"step {now}/{config.num_steps}"
    return None if saved is None else f"step {saved}/{config.num_steps}, saved"
