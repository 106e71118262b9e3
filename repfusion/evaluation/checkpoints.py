"""A checkpoint -> images that each suite asks for -> `scores.json` and `gallery.png` in a folder.

step_00000500/  scenes/      items, outputs, answers and scores of a suite (columns.py)
                gallery.png
                scores.json  written last: it marks the evaluation complete

Processes that evaluate one checkpoint to one folder share its images out; what was complete when one was
killed is not made again.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from repfusion.evaluation.columns import known, scores_column, write_items
from repfusion.evaluation.draw import Drawing
from repfusion.evaluation.gallery import Tile, TitledRow, gallery
from repfusion.evaluation.parts import Draws, Outputs, Run, Shares
from repfusion.evaluation.record import GALLERIES, GALLERY, SCORES, Evaluation, EvaluationConfig, SuiteResult
from repfusion.evaluation.suites.base import Item, Scores, Suite
from repfusion.files import atomic_path, digest_of, write_json
from repfusion.runs.completion import read_complete


@dataclass(frozen=True)
class Scored:
    """A suite's columns, complete; images stay on disk."""

    suite: Suite
    items: Sequence[Item]
    outputs: Outputs
    scores: Scores

    @property
    def result(self) -> SuiteResult:
        suite, number = self.suite, len(self.items)
        return SuiteResult(
            num_items=number, judge=suite.judge_version, rule=suite.rule_version, scores=self.scores
        )

    def rows(self) -> dict[str, list[Tile]]:
        """Tiles by the title of their row: of each item that the suite shows the images that it was asked
        with, and the first that was drawn.
        """
        rows = self.suite.gallery(self.items) or {"": range(len(self.items))}
        return {title: [tile for i in row for tile in self._tiles(i)] for title, row in rows.items()}

    def _tiles(self, index: int) -> Iterator[Tile]:
        item = self.items[index]
        for number, given in enumerate(item.request.images, start=1):
            yield Tile(given, f"image {number}")
        share = self.scores.by_item.get(item.key)
        yield Tile(self.outputs[index][0], item.request.prompt, None if share is None else share > 0.5)


def _run_here(work: Callable[[], Any]) -> Any:
    return work()


def evaluate_checkpoint(
    checkpoint: Path,
    out: Path,
    config: EvaluationConfig = EvaluationConfig(),
    run: Run = _run_here,
) -> Evaluation:
    """Draws, judges, scores, and writes `gallery.png` and then `scores.json` under `out`, each atomically.
    What lies there and was decided by the same is not made again.

    `run` is given the work in pieces, such as to load the checkpoint or to sample one batch, and may call
    each in a thread of its choice.

    Raises:
        ValueError: an incomplete or damaged checkpoint, or one whose frozen weights are not those on this
            machine.
    """
    started = time.perf_counter()
    info = read_complete(checkpoint)
    drawing = Drawing(checkpoint, config, run)
    scored = {
        name: score_suite(suite, out / name, drawing, config.max_items, run)
        for name, suite in config.build_suites().items()
    }
    run(partial(write_galleries, gallery_rows(scored), out))
    evaluation = Evaluation(
        checkpoint=str(checkpoint),
        step=info.get("step"),
        config=config,
        suites={name: one.result for name, one in scored.items()},
        seconds=round(time.perf_counter() - started, 2),
    )
    write_json(out / SCORES, evaluation.model_dump(mode="json"))
    return evaluation


def help_evaluate(
    checkpoint: Path, out: Path, config: EvaluationConfig = EvaluationConfig(), run: Run = _run_here
) -> int:
    """Draws and judges what `evaluate_checkpoint`, in another process, has not come to, and returns of how
    many parts of suites; scores nothing.

    Raises:
        ValueError: as `evaluate_checkpoint` does.
    """
    read_complete(checkpoint)
    drawing = Drawing(checkpoint, config, run)
    return sum(
        Shares(suite, run(suite.items)[: config.max_items], out / name, drawing, run).help()
        for name, suite in config.build_suites().items()
    )


def score_suite(
    suite: Suite, folder: Path, draws: Draws, max_items: int | None = None, run: Run = _run_here
) -> Scored:
    """Brings a suite's columns in `folder` up to date: outputs where the items or what draws them changed,
    answers where outputs or judge did, scores where answers or rule did.
    """
    items = run(suite.items)[:max_items]
    shares = Shares(suite, items, folder, draws, run)
    shares.finish()
    write_items(folder, items)
    ruled = {"answers": shares.digest(), "items": digest_of(known(items)), "rule": suite.rule_version}
    found = scores_column(folder).get(ruled, lambda: run(partial(suite.score, items, shares.answers())))
    return Scored(suite, items, shares.outputs, found)


def write_galleries(rows: Sequence[TitledRow], out: Path) -> None:
    """`gallery.png` with all rows, and a picture of each titled one, by its title, in `galleries/`."""
    titled = {re.sub(r"[^\w.-]+", "_", title): (title, tiles) for title, tiles in rows if title}
    pictures = {f"{GALLERIES}/{name}.png": [row] for name, row in titled.items()} | {GALLERY: rows}
    (out / GALLERIES if titled else out).mkdir(parents=True, exist_ok=True)
    for name, shown in pictures.items():
        with atomic_path(out / name) as temporary:
            gallery(shown).save(temporary, "PNG")


def gallery_rows(scored: Mapping[str, Scored]) -> list[tuple[str, list[Tile]]]:
    """Rows of all suites, each under its suite's name where there are several."""
    several = len(scored) > 1
    return [
        (": ".join(part for part in (name if several else "", title) if part), row)
        for name, one in scored.items()
        for title, row in one.rows().items()
    ]
