"""`python -m repfusion.evaluation CHECKPOINT`: scores a checkpoint on held-out prompts; with `--drop-taps`, a
trained LAP once more for each set of layers that it does without.
"""

import argparse
import sys
from pathlib import Path

from repfusion.config import load_config
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import GALLERY, SCORES, EvaluationConfig
from repfusion.evaluation.shown import as_lines
from repfusion.evaluation.taps import evaluate_without, taps_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.evaluation", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, help="folder to write (default: CHECKPOINT/../../evaluate/NAME)")
    parser.add_argument(
        "--drop-taps",
        type=taps_of,
        action="append",
        default=[],
        metavar="I,J,...",
        help="taps of a trained LAP to do without; may be given several times, each scored beside all taps",
    )
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
        if args.drop_taps:
            print("\n".join(evaluate_without(args.checkpoint, out, config, args.drop_taps)))
            return
        evaluation = evaluate_checkpoint(args.checkpoint, out, config)
    except ValueError as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    print("\n".join(as_lines(evaluation)))
    print(f"{evaluation.seconds:.1f} s; {out / SCORES}, {out / GALLERY}")


if __name__ == "__main__":
    main()
