"""Loss curves of ZeRO 0 to 3 on the same data and ranks: `python benchmarks/zero_stages.py`.

Prints, for each stage, the loss at some steps and the largest relative difference from stage 0 over all of
them. Sums taken in another order differ in the last bits, and a training amplifies that slowly: this is what
"agree within rounding" means here.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import Job, rank_server
from tiny_training import make_columns, make_foundation, tiny_data, tiny_model

from repfusion.model.dit import DiTConfig
from repfusion.tracking import metric_history
from repfusion.train import TrainConfig
from repfusion.training.engine import EngineConfig

SETTINGS = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "3, MLLM sharded": {"zero_stage": 3, "frozen": "sharded"},
    "2, offloaded": {"zero_stage": 2, "offload_optimizer": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, rank_server() as ranks:
        root = Path(temporary)
        geometry = {"tower_width": 64, "text_width": 128, "text_layers": 4, "grid": 4}
        foundation = make_foundation(root, **geometry)
        columns = make_columns(root / "data", 512, 256, grid=geometry["grid"], width=geometry["tower_width"])
        model = tiny_model(foundation).model_copy(update={"dit": DiTConfig()})
        uri = f"sqlite:///{root / 'mlflow.db'}"
        curves: dict[str, list[float]] = {}
        for name, setting in SETTINGS.items():
            engine = EngineConfig(
                precision=args.precision,
                micro_batch_size=8,
                lr=args.lr,
                warmup_steps=10,
                num_threads=1,
                **setting,
            )
            config = TrainConfig(
                output_dir=root / name,
                data=tiny_data(columns),
                model=model,
                engine=engine,
                tracking={"uri": uri, "system_metrics_sec": None},  # pyright: ignore[reportArgumentType]
                num_steps=args.steps,
                global_batch_size=16 * args.ranks,
                log_every_steps=1,
                checkpoint_every_steps=args.steps,
            )
            codes = ranks.run(Job(config.model_dump_json(), args.ranks, str(root / name / "log")))
            if any(codes):
                sys.exit((root / name / "log" / "0.log").read_text())
            run_id = json.loads((root / name / "train.json").read_text())["run_id"]
            curves[name] = [value for _, value in metric_history(uri, run_id, "train/loss")]
    shown = [step for step in (1, 10, 20, 40, 60, 100, 200) if step <= args.steps]
    print(
        "| stage | " + " | ".join(f"step {step}" for step in shown) + " | largest difference from stage 0 |"
    )
    print("|---" * (len(shown) + 2) + "|")
    for name, curve in curves.items():
        worst = max(abs(a - b) / b for a, b in zip(curve, curves["0"], strict=True))
        losses = " | ".join(f"{curve[step - 1]:.6f}" for step in shown)
        print(f"| {name} | {losses} | {worst:.1e} |")


if __name__ == "__main__":
    main()
