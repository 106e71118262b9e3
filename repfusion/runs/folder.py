"""Names of every file and folder that a training leaves; nothing else spells them.

OUTPUT_DIR/  config.json  train.json  mlflow_run.json  checkpoints/  evaluations/
  checkpoints/step_00000500/  config.json  model.safetensors  ema.safetensors  statistics.safetensors
                              lineage.json  resume/  pins/  complete.json (written last)
  checkpoints/step_00000500.damaged/  what a training found damaged when it resumed from the one before
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from repfusion.files import TEMPORARY

CONFIG = "config.json"
"""The resolved configuration, of a training and of the model of a checkpoint."""
WEIGHTS_FILE, AVERAGES, STATISTICS = "model.safetensors", "ema.safetensors", "statistics.safetensors"
"""A checkpoint's trained weights, their averages, and the latent statistics (also of a column of
features).
"""
LINEAGE = "lineage.json"
RESUME, LOOP = "resume", "loop.json"
"""The folder of what resuming needs, and in it the state of the loop."""
COMPLETE = "complete.json"
"""Written last: a checkpoint without it was cut short and is never read."""
PINS = "pins"
"""Files in it keep a checkpoint from being pruned."""
BEST = "best"
"""The pin of the checkpoint with the highest score."""
PIN_SEC = 24 * 3600.0
CLOCK_STEP_SEC = 60.0
"""How far into the future a date may be without being corrected: the two clocks of a file system and its
machines differ by a little.
"""
STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a training, its `output_dir`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Holds a folder for each checkpoint."""
        return self.root / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Holds a folder for each checkpoint that is evaluated beside the training."""
        return self.root / "evaluations"

    @property
    def config(self) -> Path:
        """The training's resolved configuration."""
        return self.root / CONFIG

    @property
    def summary(self) -> Path:
        """What the training said of itself when it ended."""
        return self.root / "train.json"

    @property
    def tracked(self) -> Path:
        """The MLflow run of the folder, which a resumed training continues."""
        return self.root / "mlflow_run.json"

    @property
    def progress(self) -> Path:
        """The last report of a training at work."""
        return self.root / "progress.json"

    @property
    def warnings(self) -> Path:
        """What rank 0 had to say, a line each, for whoever started the ranks."""
        return self.root / "warnings.txt"

    @property
    def stop(self) -> Path:
        """Asks the ranks to stop after a checkpoint."""
        return self.root / "stop"


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: not a checkpoint folder (expected a name like step_00000500)")
    return int(match[1])


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders under `root` with a checkpoint's name, by step. They get it when all is written: one without
    `complete.json` has lost it.
    """
    found = [path for path in root.glob("step_*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints under `root` that were written to the end, by step."""
    return [path for path in checkpoint_folders(root) if (path / COMPLETE).exists()]


def latest_checkpoint(root: Path, resumable: bool = False) -> Path | None:
    """The one of the highest step, or None; with `resumable`, the last that still holds its optimizer
    state.
    """
    folders = [
        path for path in complete_checkpoints(root) if not resumable or (path / RESUME / LOOP).exists()
    ]
    return folders[-1] if folders else None


def working_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder.with_name(f".{folder.name}.partial")


def set_aside(folder: Path, why: str) -> Path:
    """Renames a folder to NAME.WHY, or NAME.WHY-2 and so on: nothing that was set aside is overwritten."""
    target, number = folder.with_name(f"{folder.name}.{why}"), 1
    while os.path.lexists(target):
        number += 1
        target = folder.with_name(f"{folder.name}.{why}-{number}")
    folder.rename(target)
    return target


def is_pinned(folder: Path) -> bool:
    """Whether somebody still needs the checkpoint: it holds a file pins/NAME that is younger than a day, or
    pins/best.
    """
    ages = {pin.name: age_of(pin) for pin in (folder / PINS).glob("*")}
    return any(name == BEST or (age is not None and age < PIN_SEC) for name, age in ages.items())


def age_of(path: Path) -> float | None:
    """Seconds since a file was last touched; None where it is gone. Both ends of the time are of the file
    system's clock, since the machine that touched it may have another than this one. A date of the future, as
    before a clock was set back, counts as now from now on.
    """
    try:
        touched = path.stat().st_mtime
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent.parent
        ) as now:
            age = os.stat(now.name).st_mtime - touched
        if age < -CLOCK_STEP_SEC:
            os.utime(path)
    except FileNotFoundError:
        return None
    return max(age, 0.0)
