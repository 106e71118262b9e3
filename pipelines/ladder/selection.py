"""All results in a file -> those that may share a table: one budget, the same weights throughout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.ladder.results import ComputePoint, Line, Result
from pipelines.ladder.rows import ROWS
from pipelines.ladder.statistics import Seeds


@dataclass(frozen=True)
class Selection:
    """Results of one budget, the last of each row and seed, and what was left out of the file."""

    budget: str | None
    results: tuple[Result, ...] = ()
    failed: tuple[Result, ...] = ()
    """Those that no later run of the same row and seed made good."""
    other_budgets: dict[str, int] = field(default_factory=dict)
    """Results by budget (name and digest)."""
    other_weights: tuple[Result, ...] = ()
    """Of this budget, on weights or a model that later results do not share."""

    @property
    def rows(self) -> dict[str, list[Result]]:
        """By row, in the order of ROWS; only rows that have results."""
        by_row = {name: [one for one in self.results if one.row == name] for name in ROWS}
        return {name: sorted(found, key=lambda one: one.seed) for name, found in by_row.items() if found}

    @property
    def scores(self) -> dict[str, Seeds]:
        """Final scores by row and seed."""
        return {row: {one.seed: one.score for one in found} for row, found in self.rows.items()}

    @property
    def losses(self) -> dict[str, Seeds]:
        """Final validation losses by row and seed."""
        return {
            row: {one.seed: one.points[-1].validation_loss for one in found}
            for row, found in self.rows.items()
        }


def label(line: Line) -> str:
    return f"{line.budget_name} {line.budget[:8]}"


def select(results: Sequence[Result], budget: str | None = None) -> Selection:
    """`budget` is a name or the start of a digest; None takes the one with the most finished results, of
    equals the latest.

    Raises:
        ValueError: no such budget, or a name of several; the message lists them.
    """
    complete = [one for one in results if one.status == "ok"]
    counts = Counter(one.budget for one in complete)
    names = {one.budget: label(one) for one in results}
    if budget is None:
        order = {one.budget: number for number, one in enumerate(complete)}
        chosen = max(counts, key=lambda digest: (counts[digest], order[digest]), default=None)
    else:
        fitting = {
            one.budget for one in results if one.budget_name == budget or one.budget.startswith(budget)
        }
        if len(fitting) != 1:
            raise ValueError(f"budget {budget}: {len(fitting)} fit; there are {', '.join(names.values())}")
        chosen = fitting.pop()
    mine = [one for one in complete if one.budget == chosen]
    # later lines say which weights and which model of a row are the present ones
    weights = {name: digest for one in mine for name, digest in one.weights.items()}
    models = {one.row: one.model for one in mine}
    fits = [one.weights.items() <= weights.items() and one.model == models[one.row] for one in mine]
    latest = {(one.row, one.seed): one for one, good in zip(mine, fits, strict=True) if good}
    failed = {(one.row, one.seed): one for one in results if one.status == "failed" and one.budget == chosen}
    return Selection(
        budget=chosen,
        results=tuple(latest.values()),
        failed=tuple(one for key, one in failed.items() if key not in latest),
        other_budgets={names[digest]: number for digest, number in counts.items() if digest != chosen},
        other_weights=tuple(one for one, good in zip(mine, fits, strict=True) if not good),
    )


def select_points(points: Sequence[ComputePoint], selection: Selection) -> list[ComputePoint]:
    """Points of the checkpoints that a selection's results are about."""
    wanted = {one.run for one in selection.results}
    latest = {one.key: one for one in points if one.status == "ok" and one.run in wanted}
    return list(latest.values())
