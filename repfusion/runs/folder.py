"""Names of every file and folder that a training leaves; nothing else spells them.

OUTPUT_DIR/  config.json  train.json  mlflow_run.json  checkpoints/  evaluations/
  checkpoints/step_00000500/  config.json  model.safetensors  ema.safetensors  statistics.safetensors
                              lineage.json  resume/  pins/  complete.json (written last)
  checkpoints/step_00000500.damaged/  what a training found damaged when it resumed from the one before
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

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
PIN_SEC = 24 * 3600.0
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
    pins = list((folder / "pins").glob("*"))
    oldest = time.time() - PIN_SEC
    return any(pin.name == "best" or pin.stat().st_mtime > oldest for pin in pins if pin.exists())
