"""What a training leaves, without the training: checkpoints of a tiny model, configuration, MLflow run."""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.entities import Run
from tiny_training import make_columns, make_foundation, tiny_model, tiny_train

from pipelines.evaluation.config import EvaluateConfig
from repfusion.files import write_json
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.runs.checkpoint import save_checkpoint
from repfusion.runs.folder import checkpoint_folder
from repfusion.tracking import Tracker, TrackingConfig
from repfusion.train import TrainConfig

QUICK = {
    "suites": {"scenes": {"num_prompts": 6}},
    "batch_size": 6,
    "sampler": {"num_steps": 1},
    "backoff_sec": 0.2,
}


def evaluate_config(**changes: Any) -> EvaluateConfig:
    """One step of six prompts of the scenes suite."""
    return EvaluateConfig.model_validate({**QUICK, **changes})


class EvaluatedTraining:
    """A training of `num_steps` steps under `root`, with checkpoints at `steps`."""

    def __init__(self, root: Path, steps: tuple[int, ...], num_steps: int = 6, tracked: bool = True):
        foundation, columns = make_foundation(root / "weights"), make_columns(root)
        tracking = TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}", system_metrics_sec=None)
        self.train: TrainConfig = tiny_train(
            foundation,
            columns,
            root / "train",
            num_steps=num_steps,
            tracking=tracking if tracked else TrackingConfig(),
        )
        self.folder, self.uri = self.train.output_dir, tracking.uri
        self.folder.mkdir()
        write_json(self.folder / "config.json", self.train.model_dump(mode="json"))
        self.run_id: str | None = None
        if tracked:
            tracker = Tracker(self.train.tracking)
            self.run_id = tracker.run_id
            write_json(self.folder / "mlflow_run.json", {"run_id": self.run_id})
            tracker.finish()
        statistics = LatentStatistics.load(columns / "image_features" / "statistics.safetensors")
        torch.manual_seed(0)
        self.generator = build_model(tiny_model(foundation), statistics)
        for step in steps:
            self.write_checkpoint(step)

    def checkpoint(self, step: int) -> Path:
        return checkpoint_folder(self.folder / "checkpoints", step)

    def evaluation(self, step: int) -> Path:
        return self.folder / "evaluations" / f"step_{step:08d}"

    def write_checkpoint(self, step: int) -> None:
        state = self.generator.trainable_state()
        save_checkpoint(self.checkpoint(step), self.generator, state, step=step)
        if self.run_id is not None:
            config = self.train.tracking.model_copy(update={"run_id": self.run_id})
            Tracker(config, attach=True).log_checkpoint(self.checkpoint(step), step)

    def damage(self, step: int) -> bytes:
        """Half of the averaged weights; returns what they were."""
        path = self.checkpoint(step) / "ema.safetensors"
        before = path.read_bytes()
        path.write_bytes(before[: len(before) // 2])
        return before

    def repair(self, step: int, weights: bytes) -> None:
        (self.checkpoint(step) / "ema.safetensors").write_bytes(weights)

    def hang(self, step: int) -> None:
        """Whoever reads the checkpoint waits for ever: its complete.json is a pipe that nobody writes to."""
        path = self.checkpoint(step) / "complete.json"
        path.unlink()
        os.mkfifo(path)

    def attempts(self, step: int) -> list[str]:
        """What became of each attempt."""
        path = self.evaluation(step) / "attempts.json"
        return [one["status"] for one in json.loads(path.read_text())["attempts"]] if path.exists() else []

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, registry_uri=self.uri)

    def children(self, step: int) -> list[Run]:
        """The nested MLflow runs of one checkpoint's evaluations, by attempt."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        runs = self.client.search_runs([experiment], query)
        named = [run for run in runs if run.info.run_name == f"evaluate step_{step:08d}"]
        return sorted(named, key=lambda run: int(run.data.tags["attempt"]))

    def traceback(self, run: Run) -> str:
        return mlflow.artifacts.load_text(f"{run.info.artifact_uri}/traceback.txt")
