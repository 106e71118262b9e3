"""`python -m repfusion.evaluation.folder IMAGES CONFIG.yaml`: scores images that anyone drew of a suite's
prompts, as the published scorers do. One that is missing or broken is counted, and said.

IMAGES/KEY.png                  of items of one image, by the item's key
IMAGES/KEY/0000.png ...         of several, in the order of their names; KEY/samples/ as GenEval has it
IMAGES/KEY.png                  with `grid: 2`, a square of 2 x 2 images, as DPG-Bench and OneIG have it
OUT/answers/00000.jsonl ... scores.json  beside the identities of what decided them; a part is judged once
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from repfusion.config import Config, load_config
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.evaluation.columns import answers_column, known, scores_column, write_items
from repfusion.evaluation.parts import parts_of
from repfusion.evaluation.record import SuiteResult
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge
from repfusion.evaluation.suites.build import SuiteConfig, build_suite
from repfusion.evaluation.suites.published.outputs import missing_record
from repfusion.files import bytes_sha256, digest_of
from repfusion.images.decode import read_pixels
from repfusion.images.limits import BadImage

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SAMPLES = "samples"


class ScoredFolderConfig(Config):
    """How the images of a folder are scored."""

    suite: SuiteConfig
    """A suite whose judge answers for each image by itself: one of docs/suites.md."""
    grid: int = Field(default=1, ge=1)
    """Images along a side of each file, which is cut apart, row by row."""
    device: str | None = None
    """Torch device; None takes CUDA where there is one."""


Found = Image | dict[str, Any]
"""An image, or the record of one that is not there."""


def score_folder(images: Path, config: ScoredFolderConfig, out: Path) -> SuiteResult:
    """Judges and scores what lies in a folder, and writes answers and scores under `out`. A changed judge
    answers anew; a changed rule scores anew without it.

    Raises:
        ValueError: there is no such folder, an item has more images than the suite asks for, or the suite's
            judge does not answer for each image.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    suite = build_suite(config.suite, seed=0)
    items = list(suite.items())
    files = [_files_of(images, item, config.grid) for item in items]
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge = cache(partial(suite.judge, device))
    write_items(out, items)
    answered, digests = [], []
    for part in parts_of([item.num_outputs for item in items]):
        column = answers_column(out, part.number)
        span = slice(part.items.start, part.items.stop)
        judged = {
            "images": digest_of([[[path.name, _digest(path)] for path in own] for own in files[span]]),
            "grid": config.grid,
            "items": digest_of(known(items[span])),
            "judge": suite.judge_version,
        }
        answered += column.get(judged, partial(_judge, judge, items[span], files[span], config.grid))
        digests.append(column.digest())
    ruled = {"answers": digest_of(digests), "items": digest_of(known(items)), "rule": suite.rule_version}
    found = scores_column(out).get(ruled, partial(suite.score, items, answered))
    return SuiteResult(num_items=len(items), judge=suite.judge_version, rule=suite.rule_version, scores=found)


def _files_of(images: Path, item: Item, grid: int) -> list[Path]:
    """The files of an item, as many as there should be at most."""
    expected = -(-item.num_outputs // grid**2)
    single = [images / f"{item.key}{ending}" for ending in ENDINGS]
    found = [path for path in single if path.is_file()]
    for folder in (images / item.key, images / item.key / SAMPLES):
        if folder.is_dir():
            found += sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if len(found) > expected:
        raise ValueError(
            f"{images}: {len(found)} files of item {item.key} ({found[0].name} to {found[-1].name}), "
            f"expected {expected}; take the others away, or set num_images"
        )
    return found


def _digest(path: Path) -> str:
    return bytes_sha256(path.read_bytes())


def _judge(
    load: Callable[[], Judge], items: Sequence[Item], files: Sequence[Sequence[Path]], grid: int
) -> list[Answer]:
    """A record for each image that an item should have; the judge sees those that there are, one item at a
    time.
    """
    judge = load()
    found: list[Answer] = []
    for item, own in zip(items, files, strict=True):
        outputs = _outputs(item, own, grid)
        seen = [one for one in outputs if isinstance(one, np.ndarray)]
        answers = iter(judge([item], [seen])[0]) if seen else iter(())
        records = [next(answers, None) if isinstance(one, np.ndarray) else one for one in outputs]
        if None in records or next(answers, None) is not None:
            raise ValueError(
                f"item {item.key}: the judge does not answer for each image; a folder is scored by a "
                "suite of docs/suites.md"
            )
        found.append(records)
    return found


def _outputs(item: Item, files: Sequence[Path], grid: int) -> list[Found]:
    """The images of an item, and what stands for those that are missing."""
    found: list[Found] = []
    for path in files:
        try:
            found += _cut(read_pixels(path.read_bytes()), grid)
        except BadImage as error:
            found += [dict(missing_record(error.reason, f"{path.name}: {error.detail}"))] * grid**2
    found = found[: item.num_outputs]
    gone = item.num_outputs - len(found)
    return found + [dict(missing_record("missing_image", f"{gone} of {item.num_outputs} images"))] * gone


def _cut(image: Image, grid: int) -> list[Image]:
    """The images of a square of them, row by row; what does not divide is left over, right and below."""
    height, width = (side // grid for side in image.shape[:2])
    if not height or not width:
        raise BadImage("undecodable_image", f"{image.shape[1]} x {image.shape[0]} px, too small for a grid")
    corners = [(row * height, column * width) for row in range(grid) for column in range(grid)]
    return [np.ascontiguousarray(image[top : top + height, left : left + width]) for top, left in corners]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.evaluation.folder", description=__doc__)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("config", type=Path, help="YAML of ScoredFolderConfig: suite, grid, device")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as suite.official=true")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(ScoredFolderConfig, args.config, args.overrides)
        result = score_folder(args.images, config, args.out)
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    counts, values = result.scores.counts, result.scores.values
    for name, value in values.items():
        of = f"  ({counts[name].correct}/{counts[name].total})" if name in counts else ""
        print(f"{name:24} {value:.4f}{of}")
    for name in (name for name in counts if name not in values):
        print(f"{name:24} {counts[name].correct}/{counts[name].total}")


if __name__ == "__main__":
    main()
