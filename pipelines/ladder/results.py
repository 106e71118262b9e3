"""What runs leave: one JSON line each in a file that is committed, appended to as a whole or not at all; and
which of them may share a table: those of one budget, with the same weights throughout.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from pipelines.ladder.plans.base import Plan
from pipelines.ladder.statistics import Seeds
from repfusion.config import Strict
from repfusion.files import atomic_path


class ResultLine(Strict):
    """What identifies a result. Two of the same `key` are the same experiment."""

    row: str
    seed: int
    budget_name: str
    budget: str
    """Digest of data, training and scoring."""
    model: str
    """Digest of the row's model and of the weights it stands on."""
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    """What went wrong, where the status is failed."""
    time: str
    """When it ended, UTC."""

    @property
    def run(self) -> tuple[Any, ...]:
        """Which training it is about."""
        return self.row, self.seed, self.budget, self.model

    @property
    def key(self) -> tuple[Any, ...]:
        return self.run


class CheckpointScores(Strict):
    """Scores of one checkpoint."""

    step: int
    headline: str
    """Name of the value that is compared."""
    values: dict[str, float]
    """What the suite found, by name."""
    num_prompts: int
    validation_loss: float
    """Velocity loss on held-out scenes; comparable within one latent space only."""

    @property
    def score(self) -> float:
        return self.values[self.headline]


class Result(ResultLine):
    """One training. A failed one has no points."""

    settings: dict[str, Any] = {}
    """The budget in words: what `budget` is the digest of."""
    weights: dict[str, str] = {}
    """sha256 of each folder of weights it stands on, by name."""
    points: tuple[CheckpointScores, ...] = ()
    """Checkpoints by step; the last one is the result."""
    samples_per_sec: float | None = None
    """Rate of the training; of a resumed one, since it was resumed."""
    final_loss: float | None = None
    train_sec: float | None = None
    """What all steps take at that rate."""
    score_sec: float | None = None
    flops_per_image: float | None = None
    trainable_parameters: int | None = None
    dit: dict[str, Any] = {}
    hardware: str = ""
    commit: str | None = None
    local_changes: bool | None = None
    run_id: str | None = None
    """MLflow's."""

    @property
    def score(self) -> float:
        return self.points[-1].score


class ComputePoint(ResultLine):
    """A final checkpoint sampled with some number of steps."""

    num_steps: int
    score: float | None = None
    """The suite's headline."""
    num_prompts: int = 0
    flops_per_image: float | None = None
    seconds: float | None = None
    hardware: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return *self.run, self.num_steps, self.num_prompts


L = TypeVar("L", bound=ResultLine)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read(path: Path, kind: type[L]) -> list[L]:
    """All results in the order in which they ended; none where there is no file.

    Raises:
        ValueError: a line that is no result, with its number.
    """
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(kind.model_validate_json(text))
        except ValidationError as error:
            raise ValueError(
                f"{path}, line {number}: not a {kind.__name__}: {error.errors()[0]['msg']} at "
                f"{error.errors()[0]['loc']}; restore the file from version control or remove the line"
            ) from error
    return found


def append(path: Path, line: ResultLine) -> None:
    """The file holds the line whole or is as it was, whoever appends beside and whenever the machine dies."""
    with _locked(path):
        before = path.read_bytes() if path.exists() else b""
        with atomic_path(path) as temporary:
            temporary.write_bytes(before + line.model_dump_json().encode() + b"\n")


def finished(lines: Sequence[ResultLine]) -> set[tuple[Any, ...]]:
    """Keys of what need not run again; what failed does."""
    return {line.key for line in lines if line.status == "ok"}


@dataclass(frozen=True)
class Selection:
    """Results of one budget, the last of each row and seed, and what was left out of the file."""

    plan: Plan
    budget: str | None
    results: tuple[Result, ...] = ()
    failed: tuple[Result, ...] = ()
    """Failures that no later run of the same row and seed made good."""
    other_budgets: dict[str, int] = field(default_factory=dict)
    """Results by budget (name and digest)."""
    other_weights: tuple[Result, ...] = ()
    """Results of this budget, on weights or a model that later results do not share."""

    @property
    def rows(self) -> dict[str, list[Result]]:
        """Results by row, in the order of the plan; only rows that have results."""
        by_row = {name: [one for one in self.results if one.row == name] for name in self.plan.rows}
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


def label(line: ResultLine) -> str:
    return f"{line.budget_name} {line.budget[:8]}"


def select(plan: Plan, results: Sequence[Result], budget: str | None = None) -> Selection:
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
        plan=plan,
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
