"""The command line of `pipelines`: a command, its workflow, overrides, and options of its own."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from repfusion.display.options import WithDefaults

PROG = "python -m pipelines"
SCRIPT = "repfusion"
"""Name of the console script, under which the same commands run."""


def program() -> str:
    """What this process was called as."""
    return SCRIPT if Path(sys.argv[0]).name == SCRIPT else PROG


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe", type=int, default=128, metavar="N", help="samples to send through the stages"
    )
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="STAGE=SAMPLES_PER_SEC",
        help="of one actor, for other machines than this one",
    )


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report-only", action="store_true", help="name what is broken, touch nothing")


def _retry_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reason", action="append", help="of drops to try again (default: those that may have passed)"
    )


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", default="latest", metavar="N", help="of the checkpoint, or latest, best, all"
    )
    parser.add_argument(
        "--urgent", action="store_true", help="not only in the time that a training leaves to spare"
    )


def _gc_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--and",
        dest="others",
        type=Path,
        action="append",
        default=[],
        metavar="CONFIG.yaml",
        help="a further workflow whose outputs stay",
    )
    parser.add_argument("--trainings", action="store_true", help="list trainings too, also those set aside")
    parser.add_argument("--delete", action="store_true", help="remove what is listed")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": ("bring every stage up to date", _no_options),
    "status": ("what each stage holds: fresh, partial, stale or missing, and why", _no_options),
    "plan": ("shards, samples, bytes and device time before anything runs", _plan_options),
    "verify": ("read every byte again; quarantine what is broken and rebuild only that", _verify_options),
    "retry": ("download again what failed for a reason that may have passed", _retry_options),
    "evaluate": (
        "score checkpoints now; CONFIG.yaml may also be a workflow's root, a training or a checkpoint",
        _evaluate_options,
    ),
    "gc": (
        "list what no workflow refers to; --delete removes it, of trainings only with --trainings",
        _gc_options,
    ),
}
"""What each command does, and its own options."""


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command with its options. Ends the process where the words ask for help or are wrong."""
    prog = program()
    first, *rest = words or [""]
    if first in COMMANDS:
        # intermixed, so that options may stand between or after the overrides
        return command_parser(first, prog).parse_intermixed_args(rest)
    width = max(map(len, COMMANDS))
    lines = [f"{name:<{width}} {about}" for name, (about, _) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND CONFIG.yaml [key.path=value ...]",
        description="\n".join(["A workflow's data, training and evaluation.", "", *lines]),
        epilog=f"'{prog} COMMAND --help' lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.parse_args([first] if first else [])
    raise AssertionError("a command that is none was taken for one")


def command_parser(name: str, prog: str = PROG) -> argparse.ArgumentParser:
    """The options of one command; its result says which it is."""
    about, add_options = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"{prog} {name}", description=f"{about[0].upper()}{about[1:]}.", formatter_class=WithDefaults
    )
    parser.set_defaults(command=name)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the workflow")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="a field's value in the place of the file's"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    add_options(parser)
    return parser
