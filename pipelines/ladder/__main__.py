"""`python -m pipelines.ladder COMMAND [CONFIG.yaml] [key.path=value ...]`: the papers'
comparisons, RepFusion's, UniFusion's or the related systems', as the configuration says.

run      data, then every (row, seed) that has no result yet: training and scores; `rows=[...] seeds=[...]`
compute  the final checkpoints sampled with more or fewer steps
table    the page (docs/ladder.md) and its charts, from the result files alone
plan     what `run` would do, with the DiT and the FLOPs of every row; nothing is trained
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from pipelines.ladder.config import CONFIGS, LadderConfig
from pipelines.runtime.session import StageError
from repfusion.config import load_config
from repfusion.display.redaction import redact_text, redact_tracebacks
from repfusion.display.terminal import printable_lines

DEFAULT = CONFIGS / "ladder.yaml"


def print_plan(config: LadderConfig) -> None:
    from pipelines.ladder.results import Result, finished, read
    from pipelines.ladder.rows import image_flops, matched_dits, model_of

    common, plan = config.common, config.compared
    done = {key[:2] for key in finished(read(config.results, Result))}
    for name in config.chosen:
        try:
            model = model_of(plan.rows[name], common, matched_dits(plan, common, [name]))
            flops = image_flops(model, common)
        except (ValueError, OSError) as error:
            print(f"{name:<24} cannot be built: {str(error).splitlines()[0]}")
            continue
        runs = plan.in_order([name], config.seeds)
        have = sum(run in done for run in runs)
        print(
            f"{name:<24} DiT {model.dit.depth} x {model.dit.hidden_size}, {flops / 1e9:.2f} GFLOPs an image, "
            f"results of any budget for {have} of {len(runs)} seeds"
        )


def terminate(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "compute", "table", "plan"])
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.yaml | key.path=value")
    parser.add_argument("--budget", help="of `table`: a name or digest; the one with the most results")
    args = parser.parse_intermixed_args()
    paths = [Path(text) for text in args.arguments if "=" not in text]
    overrides = [text for text in args.arguments if "=" in text]
    if len(paths) > 1:
        parser.error(f"one config file, got {', '.join(map(str, paths))}; overrides are key.path=value")
    try:
        config = load_config(LadderConfig, paths[0] if paths else DEFAULT, overrides)
        match args.command:
            case "run":
                from pipelines.ladder.schedule import run_ladder

                failed = run_ladder(config)
            case "compute":
                from pipelines.ladder.compute import run_compute

                failed = run_compute(config)
            case "table":
                from pipelines.ladder.report import write_report

                print(write_report(config, args.budget))
                return 0
            case _:
                print_plan(config)
                return 0
    except (ValueError, StageError) as error:
        print(printable_lines(redact_text(f"error: {error}")), file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} runs failed; their errors are in the results, and running again retries them")
    return 1 if failed else 0


if __name__ == "__main__":
    redact_tracebacks()
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
