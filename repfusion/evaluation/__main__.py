"""`python -m repfusion.evaluation CHECKPOINT`: scores a checkpoint on held-out prompts."""

import argparse
import sys
from pathlib import Path

from repfusion.config import load_config
from repfusion.evaluation.checkpoints import EvaluationConfig, evaluate_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.evaluation", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, help="folder to write (default: CHECKPOINT/../../evaluate/NAME)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="fields of EvaluationConfig, such as sampler.num_steps=50",
    )
    args = parser.parse_intermixed_args()
    out = args.out or args.checkpoint.resolve().parent.parent / "evaluate" / args.checkpoint.resolve().name
    try:
        config = load_config(EvaluationConfig, {}, args.overrides)
        evaluation = evaluate_checkpoint(args.checkpoint, out, config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    scores = evaluation.scores
    for task, value in scores.per_task.items():
        print(f"{task:20} {value:.3f}  ({scores.counts[task].correct}/{scores.counts[task].total})")
    print(f"{'overall':20} {scores.overall:.3f}  (shuffled prompts: {scores.shuffled_overall:.3f})")
    if scores.new_concept is not None:
        print(f"{'new concept':20} {scores.new_concept:.3f}")
    print(f"{evaluation.seconds:.1f} s; {out / 'scores.json'}, {out / 'gallery.png'}")


if __name__ == "__main__":
    main()
