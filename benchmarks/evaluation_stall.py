"""What evaluations cost the training beside them: its step times without any, with a slow one, with some that
crash; ratios of one run (target 1).

`python benchmarks/evaluation_stall.py`. Three trainings of the same steps by Ray Train, in rounds, so that a
busy machine slows all alike: `none` evaluates nothing, `slow` draws more prompts than the training leaves
time for, `crash` meets an error at each checkpoint once it is loaded. The step times are those that the
training reports to MLflow, from the first checkpoint on. Checked as well: `slow` was at work to the end, and
each crash is a nested MLflow run with status FAILED, an error and a traceback.
"""

import argparse
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tiny_training import make_columns, make_foundation, tiny_data, tiny_model

from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.ranks import launch
from pipelines.runtime.session import RayConfig, ray_session
from repfusion.model.dit import DiTConfig
from repfusion.tracking import TrackingConfig, metric_history, prepare_store
from repfusion.train import TrainConfig
from repfusion.training.engine import EngineConfig

EVALUATE: dict[str, dict[str, Any]] = {
    "none": {"beside_training": False},
    "slow": {"suites": {"scenes": {"num_prompts": 5000}}, "batch_size": 16, "deadline_sec": None},
    # no machine has it: the error comes once the checkpoint is loaded
    "crash": {"device": "cuda:99"},
}


class Over(Exception):
    """The training is: what is still being evaluated is not waited for."""


def train_config(root: Path, name: str, args: argparse.Namespace) -> TrainConfig:
    """A model that keeps each rank busy for some 50 ms a step."""
    return TrainConfig(
        output_dir=root / name,
        data=tiny_data(root),
        model=tiny_model(root / "weights").model_copy(update={"dit": DiTConfig(depth=4)}),
        engine=EngineConfig(micro_batch_size=args.batch_size, num_threads=1),
        tracking=TrackingConfig(
            uri=f"sqlite:///{root / 'mlflow.db'}", run_name=name, system_metrics_sec=None
        ),
        num_steps=args.steps,
        global_batch_size=args.batch_size * args.ranks,
        checkpoint_every_steps=args.checkpoint_every_steps,
        log_every_steps=1,
    )


def run(train: TrainConfig, evaluate: EvaluateConfig, num_ranks: int, waits: bool) -> dict[str, Any]:
    """What train.json says. `waits` for the evaluation that is at work in the end."""
    train.output_dir.mkdir()
    with suppress(Over), EvaluationScheduler(evaluate, train):
        launch(train, num_ranks)
        if not waits:
            raise Over
    return json.loads((train.output_dir / "train.json").read_text())


def step_times_sec(train: TrainConfig, summary: dict[str, Any]) -> list[float]:
    """Seconds of each step after the first checkpoint."""
    rates = metric_history(summary["tracking_uri"], summary["run_id"], "train/samples_per_sec")
    return [train.global_batch_size / rate for step, rate in rates if step > train.checkpoint_every_steps]


def attempts(train: TrainConfig) -> list[str]:
    """What became of each, by step and attempt."""
    files = sorted((train.output_dir / "evaluations").glob("step_*/attempts.json"))
    return [one["status"] for file in files for one in json.loads(file.read_text())["attempts"]]


def crashes_in_mlflow(summary: dict[str, Any]) -> int:
    """Nested runs of crashed evaluations, each looked at."""
    client = mlflow.MlflowClient(summary["tracking_uri"])
    experiment = client.get_run(summary["run_id"]).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{summary['run_id']}'"
    failed = [run for run in client.search_runs([experiment], query) if run.info.status == "FAILED"]
    for run in failed:
        assert run.data.tags["error"], run.info.run_id
        assert "in evaluate" in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/traceback.txt")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--checkpoint-every-steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    args = parser.parse_args()
    times: dict[str, list[float]] = {kind: [] for kind in EVALUATE}
    num_crashes, num_slow = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        geometry = {"tower_width": 64, "text_width": 128, "text_layers": 4, "grid": 4}
        make_foundation(root / "weights", **geometry)
        make_columns(root, 512, 256, grid=geometry["grid"], width=geometry["tower_width"])
        prepare_store(f"sqlite:///{root / 'mlflow.db'}", TrackingConfig().experiment)
        with ray_session(RayConfig(num_cpus=args.ranks, object_store_mib=80)):
            for number in range(args.rounds):
                for kind, settings in EVALUATE.items():
                    train = train_config(root, f"{kind}_{number}", args)
                    summary = run(train, EvaluateConfig.model_validate(settings), args.ranks, kind == "crash")
                    times[kind] += step_times_sec(train, summary)
                    num_slow += kind == "slow" and attempts(train) == ["running"]
                    num_crashes += crashes_in_mlflow(summary) if kind == "crash" else 0
    assert num_slow == args.rounds, "the slow evaluation ended before the training, or did not begin"
    assert num_crashes >= args.rounds, "crashes are not in MLflow"
    result: dict[str, Any] = {"crashes_in_mlflow": num_crashes}
    for kind, values in times.items():
        for name, rank in (("median", 50), ("p95", 95)):
            value, base = np.percentile(values, rank), np.percentile(times["none"], rank)
            result[f"{kind}_{name}_ms"] = round(1000 * value, 2)
            result[f"{kind}_{name}_ratio"] = round(value / base, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
