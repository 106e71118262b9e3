"""OUT/results.jsonl: a line for each row and seed as soon as it is there, kept apart by plan and by
foundation.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.results import ResultLine, read
from pipelines.ladder.statistics import Seeds
from repfusion.files import write_text

log = logging.getLogger(__name__)
FILE = "results.jsonl"


class RowResult(ResultLine):
    """One row of one seed. `budget` is the plan's digest, `model` that of the whole foundation."""

    num_steps: int
    scores: dict[str, Any] = {}
    """The suite's values, counts and intervals, of the averaged weights at the end."""
    half: dict[str, Any] = {}
    """Scores after half of the steps."""
    paired: dict[str, Any] = {}
    """Velocity losses by noise level and prompt, see `losses`."""
    curve: tuple[tuple[int, float], ...] = ()
    """Mean training loss of the steps up to each."""
    seconds: float | None = None
    """Time spent in training steps."""
    steps_per_sec: float | None = None
    num_trained: int | None = None
    """Parameters that the row trains."""
    num_frozen: int | None = None
    dit: dict[str, Any] = {}
    foundation: dict[str, str] = {}
    """sha256 of each folder of the foundation."""
    perception: dict[str, Any] = {}
    """What the row's language model tells right from wrong, by kind of claim and noise level."""
    shortfalls: tuple[str, ...] = ()
    """What the row's foundation does not reach of what the plan asks of it."""
    hardware: str = ""
    commit: str | None = None
    local_changes: bool | None = None

    @property
    def score(self) -> float:
        return self.scores["values"]["overall"]


def read_results(path: Path) -> list[RowResult]:
    """All lines; a last one that was cut off in the middle of writing is taken out of the file, with a
    warning.

    Raises:
        ValueError: a line that is no result, with its number.
    """
    if path.is_file():
        lines = path.read_text(errors="replace").splitlines()
        if lines and not _is_json(lines[-1]):
            log.warning("%s: its last line was cut off and is dropped; that row runs again", path)
            write_text(path, "".join(f"{line}\n" for line in lines[:-1]))
    return read(path, RowResult)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Comparable:
    """Results of one plan on one foundation, the last of each row and seed."""

    results: tuple[RowResult, ...]
    num_others: int = 0
    """Results that were left out: of other plans or foundations."""

    @property
    def rows(self) -> dict[str, list[RowResult]]:
        """Finished results by row, in the plan's order; only rows that have some."""
        done = [one for one in self.results if one.status == "ok"]
        by_row = {name: [one for one in done if one.row == name] for name in REPFUSION.rows}
        return {name: sorted(found, key=lambda one: one.seed) for name, found in by_row.items() if found}

    @property
    def failed(self) -> list[RowResult]:
        return [one for one in self.results if one.status == "failed"]

    def values(self, name: str) -> dict[str, Seeds]:
        """A value of the suite by row and seed."""
        return {
            row: {one.seed: one.scores["values"][name] for one in found if name in one.scores["values"]}
            for row, found in self.rows.items()
        }


def comparable(results: Sequence[RowResult], plan: str | None = None) -> Comparable:
    """The results of a plan (None: the one with the most, of equals the latest) on the foundation of which
    it has the most.
    """
    mine = [one for one in results if plan is None or one.budget == plan]
    counts = Counter((one.budget, one.model) for one in mine)
    order = {(one.budget, one.model): number for number, one in enumerate(mine)}
    chosen = max(counts, key=lambda key: (counts[key], order[key]), default=None)
    latest = {(one.row, one.seed): one for one in mine if (one.budget, one.model) == chosen}
    return Comparable(tuple(latest.values()), len(results) - (counts[chosen] if chosen else 0))
