"""What an image, checkpoint or export was made from: `python -m repfusion.lineage SUBJECT`."""

import argparse
import json
import sys
from pathlib import Path

from repfusion.display.terminal import printable, printable_lines
from repfusion.lineage.trace import BROKEN, table, trace


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.lineage",
        description="What an image, a checkpoint or an export was made from, checked against this machine. "
        "Exit status 1 where something does not agree.",
    )
    parser.add_argument("subject", type=Path, metavar="IMAGE.png|CHECKPOINT|EXPORT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        links = trace(args.subject)
    except ValueError as error:
        sys.exit(printable_lines(f"error: {error}"))
    broken = [link for link in links if link.state in BROKEN]
    if args.json:
        shown = {"subject": str(args.subject), "agrees": not broken, "links": [vars(link) for link in links]}
        print(json.dumps(shown, indent=1))
    else:
        print(table(links))
    if broken:
        lines = "\n".join(
            printable(f"  {link.name}: {link.value}: {link.state}: {link.note}") for link in broken
        )
        sys.exit(f"error: {len(broken)} of {len(links)} do not agree:\n{lines}")


if __name__ == "__main__":
    main()
