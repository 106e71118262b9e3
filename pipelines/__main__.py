"""`python -m pipelines run CONFIG.yaml [key.path=value ...]`, `status` likewise; `--dry-run` prints the
resolved configuration.
"""

import argparse
import sys
import time
from pathlib import Path

from pipelines.config import WorkflowConfig, load_config, to_yaml
from pipelines.pool import StageError
from pipelines.stages import build_stages
from pipelines.store import write_atomic
from pipelines.summary import write_summary
from pipelines.workflow import describe, run, states


def run_workflow(config: WorkflowConfig, started: float) -> None:
    """Brings the workflow up to date, and says per stage what was done and in the end where the outputs
    are.
    """
    config.root.mkdir(parents=True, exist_ok=True)
    stages = build_stages(config, started)
    results = run(stages, config.root, config.ray)
    total_sec = time.perf_counter() - started
    summary = config.root / "summary.json"
    if all(result.skipped for result in results) and summary.is_file():
        print(f"nothing to do: all {len(results)} stages are fresh ({total_sec:.1f} s)")
    else:
        write_atomic(config.root / "config.yaml", to_yaml(config).encode())
        write_summary(config.root, {result.name: result.manifest for result in results}, total_sec)
        print(f"total: {total_sec:.1f} s")
    for name in ("summary.json", "gallery.png", "report.html"):
        if (config.root / name).is_file():
            print(f"{name:<12} {config.root / name}")


def print_status(config: WorkflowConfig) -> None:
    """A line per stage: fresh, partial, stale or missing, and why."""
    for name, state in states(build_stages(config), config.root).items():
        detail = describe(state.manifest) if state.status == "fresh" and state.manifest else state.reason
        print(f"{name:<9} {state.status:<8} {detail}")


def main() -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    parser.add_argument("command", choices=["run", "status"])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    # intermixed, so that the option may stand between or after the overrides
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(config), end="")
        elif args.command == "status":
            print_status(config)
        else:
            run_workflow(config, started)
    except (ValueError, StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
