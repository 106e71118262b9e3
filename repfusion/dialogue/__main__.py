"""`python -m repfusion.dialogue --checkpoint FOLDER --say "here is" --image a.png --out OUT/`: texts and
images in, texts and images out.
"""

import argparse
import sys
from pathlib import Path

from repfusion.config import load_config
from repfusion.dialogue.hold import DIALOGUE, Dialogue, HoldingConfig
from repfusion.dialogue.turns import IMAGE, REPLY, SAY, given_turns, read_turns
from repfusion.display.options import WithDefaults
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.generation.device import usable_device
from repfusion.retrieval.command import add_checkpoint
from repfusion.retrieval.decision import load_decision
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.index import ImageIndex


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.dialogue", description=__doc__, formatter_class=WithDefaults
    )
    add_checkpoint(parser)
    abouts = {SAY: ("TEXT", "what is said"), IMAGE: ("FILE", "what is shown")}
    for option, (name, about) in abouts.items():
        parser.add_argument(
            option,
            dest="parts",
            action="append",
            type=lambda value, option=option: (option, value),
            default=[],
            metavar=name,
            help=f"{about}, in the order of these options",
        )
    parser.add_argument(
        REPLY,
        dest="parts",
        action="append_const",
        const=(REPLY, ""),
        help="lets the model reply here, and not at the end alone",
    )
    parser.add_argument(
        "--turns",
        type=Path,
        metavar="FILE.json",
        help='{"turns": [[{"say": "..."}, {"image": "a.png"}], ...]}',
    )
    parser.add_argument("--index", type=Path, help="of images to retrieve (repfusion.retrieval index)")
    parser.add_argument("--decision", type=Path, help="whether to draw (repfusion.retrieval decide)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="fields of HoldingConfig, such as images=retrieve or speaking.temperature=0.7",
    )
    return parser


def hold(args: argparse.Namespace) -> list[str]:
    """Holds the dialogue of a command line; its lines, for people.

    Raises:
        ValueError: an option that does not hold, a damaged checkpoint, an index or a decision of another one,
            or turns that do not fit into the context.
    """
    if bool(args.parts) == (args.turns is not None):
        raise ValueError("expected either --say TEXT and --image FILE, or --turns FILE.json")
    turns = given_turns(args.parts) if args.turns is None else read_turns(args.turns)
    config = load_config(HoldingConfig, {}, args.overrides)
    reader = GillReader(args.checkpoint, usable_device(args.device))
    index = None if args.index is None else ImageIndex(args.index)
    decision = None
    if index is not None:
        index.check(reader.space)
        if args.decision is not None:
            decision = load_decision(args.decision, reader.space, index)
    told = Dialogue(reader, config, args.out, index, decision).hold(turns)
    lines = []
    for reply in told[1::2]:
        picture = f" [{reply['image']}, {reply['source']}]" if "image" in reply else ""
        lines.append(f"{reply['say']}{picture} ({reply['ending']})")
    return [*lines, f"{len(turns)} turn(s) -> {args.out / DIALOGUE}"]


def main() -> None:
    args = parser_of_options().parse_intermixed_args()
    try:
        print("\n".join(map(printable_lines, hold(args))))
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
