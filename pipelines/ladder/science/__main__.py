"""`python -m pipelines.ladder.science [run|table|export] [KEY=VALUE ...]`: docs/ladder/plan.md on one GPU,
without Ray, MLflow or DeepSpeed.

run      (default) foundation, then rows seed by seed, as far as --seconds reach; calling again goes on.
         KEY=VALUE is of the plan (pipelines/ladder/science/plan.py), which the first call fixes
table    OUT/table.md and a chart of each language model, from OUT/results.jsonl
export   weights and results of OUT into a folder of files below 16 MB
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines

COMMANDS = ("run", "table", "export")
CONFIG = Path("repfusion/foundation/gpu.yaml")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ladder.science",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="COMMAND | KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/science"), help="(default: runs/science)")
    parser.add_argument("--seconds", type=float, default=540, help="at most, of one call (default: 540)")
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"the foundation's (default: {CONFIG})")
    parser.add_argument("--rows", help="these alone, with commas between (default: all)")
    parser.add_argument("--seeds", help="with commas between (default: as many as the plan has of each row)")
    parser.add_argument("--steps", type=int, help="of every row (default: by --row-seconds)")
    parser.add_argument(
        "--row-seconds", type=float, default=90, help="that the slowest row is to take (default: 90)"
    )
    parser.add_argument(
        "--measured", type=int, default=200, help="texts of a kind to measure perception by (default: 200)"
    )
    parser.add_argument("--to", type=Path, help="folder of `export` (default: OUT/export)")
    return parser


def chosen_rows(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Rows and seeds that were asked for.

    Raises:
        ValueError: there are none of that name or number.
    """
    from pipelines.ladder.plans.repfusion import REPFUSION

    rows = tuple(args.rows.split(",")) if args.rows else tuple(REPFUSION.rows)
    REPFUSION.check_rows(rows)
    try:
        return rows, args.seeds and tuple(int(seed) for seed in args.seeds.split(","))
    except ValueError as error:
        raise ValueError(f"--seeds {args.seeds}: expected whole numbers with commas between") from error


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """A call, and the table of what there is then. Loading the libraries is part of its seconds."""
    began = time.monotonic()
    import torch

    from pipelines.ladder.science.results import FILE
    from pipelines.ladder.science.session import Asked, run_call
    from pipelines.ladder.science.table import write_table

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, seeds = chosen_rows(args)
    if args.steps is not None:
        overrides = [*overrides, f"num_steps={args.steps}"]
    limits = args.row_seconds, args.measured
    seconds = max(0.0, args.seconds - (time.monotonic() - began))
    asked = Asked(args.out, seconds, args.config, overrides, rows, seeds, *limits)
    run_call(asked, lambda line: print(line, flush=True))
    if (args.out / FILE).is_file():
        print(write_table(args.out))


def main() -> int:
    parser = make_parser()
    args = parser.parse_intermixed_args()
    overrides = [word for word in args.words if "=" in word]
    commands = [word for word in args.words if "=" not in word] or ["run"]
    if len(commands) > 1 or commands[0] not in COMMANDS:
        parser.error(f"expected one of {', '.join(COMMANDS)}, got {' '.join(commands)}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        match commands[0]:
            case "run":
                run(args, overrides)
            case "table":
                from pipelines.ladder.science.table import write_table

                print(write_table(args.out))
            case _:
                from pipelines.ladder.science.export import export

                print(export(args.out, args.to or args.out / "export", *chosen_rows(args)))
    except ValueError as error:
        print(printable_lines(redact_text(f"error: {error}")), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
