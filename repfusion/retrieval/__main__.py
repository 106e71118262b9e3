"""`python -m repfusion.retrieval COMMAND`: images that a checkpoint of GILL finds by what is said of them.

index    image shards -> an index of their embeddings
query    texts and images, in their order -> the nearest images
recall   how often held-out captions find their images, with chance beside it
decide   learns whether to draw an image or to retrieve one, on scenes
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from repfusion.config import load_config
from repfusion.display.options import Options, WithDefaults
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.files import json_bytes, write_json
from repfusion.generate import read_images, save_image
from repfusion.generation.device import usable_device
from repfusion.retrieval.command import add_checkpoint
from repfusion.retrieval.conversation import Conversation
from repfusion.retrieval.decision import DecisionConfig, learn_decision, save_decision
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.index import ImageIndex, build_index
from repfusion.retrieval.recall import RecallConfig, measure_recall


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m repfusion.retrieval", description=__doc__, formatter_class=WithDefaults
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", formatter_class=WithDefaults, help="image shards -> an index")
    add_checkpoint(index)
    index.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="of image shards")
    index.add_argument(
        "--column", type=Path, metavar="FOLDER", help="their column of image features, which spares encoding"
    )
    index.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder to write")
    index.add_argument("--batch-size", type=int, default=64, help="images that are read at once")
    query = commands.add_parser("query", formatter_class=WithDefaults, help="the nearest images")
    add_checkpoint(query)
    query.add_argument("--index", type=Path, required=True, metavar="INDEX")
    add_parts(query)
    query.add_argument("--num", type=int, default=5, help="images that are found")
    query.add_argument("--out", type=Path, metavar="FOLDER", help="puts them there as 1.png, 2.png, ...")
    recall = commands.add_parser("recall", formatter_class=WithDefaults, help="recall at 1, 5 and 10")
    add_checkpoint(recall)
    recall.add_argument("--out", type=Path, metavar="FILE.json", help="writes the figures there too")
    recall.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of RecallConfig, such as num=200")
    decide = commands.add_parser("decide", formatter_class=WithDefaults, help="learn to draw or to retrieve")
    add_checkpoint(decide)
    decide.add_argument("--index", type=Path, required=True, metavar="INDEX")
    decide.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    decide.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="of DecisionConfig, such as num_prompts=800",
    )
    return parser


def add_parts(group: Options) -> None:
    """Texts and images, which keep the order in which they are given: (option, value)."""
    for option, name in (("--say", "TEXT"), ("--image", "FILE")):
        group.add_argument(
            option,
            dest="parts",
            action="append",
            type=lambda value, option=option: (option, value),
            default=[],
            metavar=name,
            help="what is said and shown, in this order",
        )


def run(args: argparse.Namespace) -> object:
    """What a command line asks for; the answer is shown as JSON. Raises ValueError for what does not hold."""
    reader = GillReader(args.checkpoint, usable_device(args.device))
    match args.command:
        case "index":
            if args.batch_size < 1:
                raise ValueError(f"--batch-size {args.batch_size}: expected at least 1")
            made = build_index(reader, args.images, args.out, args.column, args.batch_size)
            return {"index": str(made.folder), "num_images": len(made), "digest": made.digest}
        case "query":
            return query(reader, args)
        case "recall":
            measured = measure_recall(reader, load_config(RecallConfig, {}, args.overrides))
            if args.out is not None:
                write_json(args.out, measured)
            return measured
        case _:
            config = load_config(DecisionConfig, {}, args.overrides)
            decision, record = learn_decision(reader, ImageIndex(args.index), config)
            save_decision(args.out, decision, record)
            return record.model_dump(mode="json")


def query(reader: GillReader, args: argparse.Namespace) -> object:
    """The images nearest to what is said and shown."""
    if not args.parts or args.num < 1:
        raise ValueError("expected --say TEXT or --image FILE, and --num of at least 1")
    index = ImageIndex(args.index)
    index.check(reader.space)
    asked = Conversation(reader)
    for option, value in args.parts:
        if option == "--say":
            asked.say(value, f"--say {value[:60]!r}")
        else:
            asked.show(read_images([Path(value)])[0], f"--image {value}")
    hits = index.find(reader.of_states(asked.call()[None]), args.num)[0]
    if args.out is not None:
        for number, hit in enumerate(hits, 1):
            save_image(Image.fromarray(index.image(hit)), args.out / f"{number}.png", None)
    return [{"shard": hit.shard, "key": hit.key, "score": hit.score} for hit in hits]


def main() -> None:
    args = parser_of_options().parse_args()
    try:
        print(json_bytes(run(args)).decode(), end="")
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
