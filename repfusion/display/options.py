"""Options of a command line -> help that says their defaults."""

import argparse
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Options(Protocol):
    """What options are added to: a parser or a group of one."""

    def add_argument(self, *names: str, **about: Any) -> Any: ...

    def add_mutually_exclusive_group(self, *, required: bool = False) -> Any: ...


class WithDefaults(argparse.RawDescriptionHelpFormatter):
    """Each option's default after its help, but where the option is off without it or says its default
    itself.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        if off or action.required or not action.help or "(default" in action.help:
            return action.help
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else "%(default)s"
        return f"{action.help} (default: {shown})"
