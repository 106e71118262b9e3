"""The command line of a training on image shards."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from repfusion.config import load_config, to_yaml
from repfusion.decoding.config import RebuildingConfig
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.training.distributed import shut_down
from repfusion.training.engine import NonFiniteError

R = TypeVar("R", bound=RebuildingConfig)


def run_command(module: str, about: str | None, kind: type[R], train: Callable[[R], dict[str, Any]]) -> None:
    """`python -m MODULE CONFIG.yaml [key.path=value ...]`: trains, and says how well what is held out is
    rebuilt; what is wrong ends the process with a message.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(kind, args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(config), end="")
            return
        found = train(config)
    except (ValueError, OSError, NonFiniteError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    if "RANK" in os.environ:
        shut_down()
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.out}: PSNR {found['psnr_db']:.2f} dB of {found['num_measured']:.0f} images held out")
