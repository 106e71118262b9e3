"""`python -m pipelines.ladder.decoders PLAN.yaml [key.path=value ...]`: makes the trainings of a plan that
are due, one after the other, and the page of all. It may be stopped at any time; the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from pipelines.ladder.decoders.page import PAGE
from pipelines.ladder.decoders.plan import DecoderPlan
from pipelines.ladder.decoders.run import due, run_plan
from repfusion.config import load_config
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.ladder.decoders", description=__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--most", type=int, metavar="N", help="trainings of this call")
    parser.add_argument("--dry-run", action="store_true", help="say what is due and what lacks, and stop")
    args = parser.parse_intermixed_args()
    try:
        plan = load_config(DecoderPlan, args.plan, args.overrides)
        for row in plan.rows:
            if (reason := plan.lacks(row)) is not None:
                print(f"{row}: not run: {reason}")
        if args.dry_run:
            print("\n".join(f"{row}, seed {seed}: due" for row, seed in due(plan)) or "nothing is due")
            return
        made = run_plan(plan, args.most)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    failed = sum(one.status == "failed" for one in made)
    print(f"{len(made)} trainings, {failed} of them failed, {len(due(plan))} are due; {plan.out / PAGE}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
