"""`python -m cluster COMMAND --cluster NAME`: the targets of the Makefile on a cluster.

up       start what cluster/configs/NAME.yaml says; where it runs, say so
status   what runs, and what does not
submit   hand a workflow over as a job: submit WORKFLOW.yaml [key.path=value ...] [--follow]
jobs     the cluster's jobs
logs     what a job says: logs JOB [--follow]
cancel   ask a job to end, with its checkpoint, and wait for it
down     end exactly what `up` started
render   write the scripts or manifests that `up` and `submit` hand to others: render FOLDER
"""

import argparse
import sys
from pathlib import Path

from cluster.config import ClusterError
from cluster.launcher import Launcher, launcher_of
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.files import write_text

COMMANDS = ("up", "status", "submit", "jobs", "logs", "cancel", "down", "render")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("what", nargs="*", help="a workflow and overrides, a job, or a folder")
    parser.add_argument(
        "--cluster", default="local2", metavar="NAME", help="of cluster/configs, or a YAML file"
    )
    parser.add_argument("--follow", action="store_true", help="print what the job says until it is over")
    return parser.parse_intermixed_args(words)


def carry_out(launcher: Launcher, args: argparse.Namespace) -> bool:
    """Whether it went well."""
    match args.command:
        case "up":
            launcher.up()
        case "status":
            return launcher.status()
        case "submit":
            return launcher.submit(Path(_first(args, "a workflow: W=...")), args.what[1:], args.follow)
        case "jobs":
            launcher.jobs()
        case "logs":
            return launcher.logs(_first(args, "a job: JOB=..."), args.follow)
        case "cancel":
            launcher.cancel(_first(args, "a job: JOB=..."))
        case "down":
            launcher.down()
        case "render":
            _write(launcher.render(), Path(_first(args, "a folder")))
    return True


def _first(args: argparse.Namespace, meant: str) -> str:
    if not args.what:
        raise ClusterError(f"{args.command} needs {meant}")
    return args.what[0]


def _write(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        write_text(folder / name, text)
        print(folder / name)
    if not files:
        print("clusters of this kind need no files")


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    try:
        return 0 if carry_out(launcher_of(args.cluster), args) else 1
    except (ClusterError, ValueError, OSError) as error:
        print(printable_lines(redact_text(f"error: {error}")), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was started stays: make cluster-status", file=sys.stderr)
        return 130
