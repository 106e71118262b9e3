"""The state of a training <-> a checkpoint that it resumes from, exactly, on any number of ranks.

step_00000500/resume/  loop.json  optimizer_RANK_of_RANKS.safetensors  rng_RANK_of_RANKS.safetensors

Each rank takes the sha256 of the files that it writes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from repfusion.files import write_json
from repfusion.model.trainable import Trainable
from repfusion.runs.checkpoint import write_model
from repfusion.runs.completion import begin_checkpoint, finish_checkpoint
from repfusion.runs.folder import (
    AVERAGES,
    CONFIG,
    LINEAGE,
    LOOP,
    RESUME,
    STATISTICS,
    WEIGHTS_FILE,
    checkpoint_folder,
    latest_checkpoint,
    working_folder,
)
from repfusion.runs.seals import Seal, Sealing
from repfusion.training.distributed import failures, gather_objects
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine
from repfusion.training.rng import load_rng, rng_path, save_rng, seed_rng


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Nothing of it remains; the ones before are as they were."""


def snapshot(
    root: Path,
    step: int,
    model: Trainable,
    ema: EMA,
    engine: Engine,
    digests: Mapping[str, str],
    state: Mapping[str, Any],
    lineage: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of `step` completed steps; called by all ranks.

    Raises:
        CheckpointError: on every rank, where one of them could not write.
    """
    folder, working = checkpoint_folder(root, step), working_folder(checkpoint_folder(root, step))
    weights, averages = engine.weights(), engine.partition.gather(ema.averages)
    position = step * state["global_batch_size"]
    own: dict[str, Seal] = {}

    def begin() -> None:
        if engine.rank == 0:
            begin_checkpoint(folder)
            (working / RESUME).mkdir()

    def write() -> None:
        random_state = rng_path(working / RESUME, engine.rank, engine.world_size)
        with Sealing(working) as sealing:
            save_rng(random_state)
            sealing.add(random_state)
            if (path := engine.partition.save(working / RESUME)) is not None:
                sealing.add(path)
            if weights is not None and averages is not None:
                write_model(working, model, weights, averages, digests)
                write_json(working / LINEAGE, {**lineage, "step": step})
                write_json(working / RESUME / LOOP, {"step": step, "position": position, **state})
                names = (CONFIG, WEIGHTS_FILE, AVERAGES, LINEAGE, f"{RESUME}/{LOOP}", STATISTICS)
                sealing.add(*(working / name for name in names if (working / name).is_file()))
            own.update(sealing.seals())

    def finish() -> None:
        seals = {name: one for part in gather_objects(own) for name, one in part.items()}
        if engine.rank == 0:
            finish_checkpoint(working, folder, {"step": step}, seals)

    for act in (begin, write, finish):
        error = None
        try:
            act()
        except (OSError, SafetensorError) as caught:
            error = caught
        if found := failures(error):
            if engine.rank == 0:
                shutil.rmtree(working, ignore_errors=True)
            raise CheckpointError(_explain(root, step, found))
    return folder


def _explain(root: Path, step: int, found: Mapping[int, str]) -> str:
    rank, text = min(found.items())
    last = latest_checkpoint(root, resumable=True)
    kept = "there is none before it" if last is None else f"the last good one is {last.name}"
    return (
        f"{root}: the checkpoint of step {step} could not be written: rank {rank}: {text}; {kept}. Free "
        "space, or see that every rank has this folder, and run again"
    )


def check_resumes(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What loop.json says. ValueError where this rank does not see it, or the run differs in what decides its
    samples.
    """
    path = folder / RESUME / LOOP
    if not path.is_file():
        raise ValueError(
            f"cannot resume: {path} is not here; output_dir has to be a folder that all ranks see"
        )
    state = json.loads(path.read_text())
    for field, value in expected.items():
        if field in state and state[field] != value:
            raise ValueError(
                f"cannot resume from {folder}: {field} was {state[field]!r}, is {value!r}; restore it, "
                f"or start a new output_dir with init_from={folder}"
            )
    return state


def resume(folder: Path, state: Mapping[str, Any], engine: Engine, ema: EMA) -> int:
    """Optimizer, averages and random generators of a checkpoint whose weights the module holds already;
    returns the number of completed steps. Called by all ranks.
    """
    step = state["step"]
    engine.partition.load(folder / RESUME, step)
    engine.partition.read(folder / AVERAGES, ema.averages)
    path = rng_path(folder / RESUME, engine.rank, engine.world_size)
    if path.exists():
        load_rng(path)
    else:
        seed_rng(state["seed"], step, engine.rank)
    return step
