"""`python -m repfusion.decoding CONFIG.yaml [key.path=value ...]`: trains a decoder on image shards;
under torchrun on several ranks.
"""

import argparse
import os
import sys
from pathlib import Path

from repfusion.config import load_config, to_yaml
from repfusion.decoding.config import DecoderTrainingConfig
from repfusion.decoding.train import train_decoder
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.training.distributed import shut_down
from repfusion.training.engine import NonFiniteError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.decoding", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(DecoderTrainingConfig, args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(config), end="")
            return
        found = train_decoder(config)
    except (ValueError, OSError, NonFiniteError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    if "RANK" in os.environ:
        shut_down()
    if os.environ.get("RANK", "0") == "0":
        print(f"{config.out}: PSNR {found['psnr_db']:.2f} dB of {found['num_measured']:.0f} images held out")


if __name__ == "__main__":
    main()
