"""What runs leave: one JSON line each in a file that is committed, appended to as a whole or not at all."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from repfusion.config import Strict
from repfusion.files import atomic_path


class Line(Strict):
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


class Point(Strict):
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


class Result(Line):
    """One training. A failed one has no points."""

    settings: dict[str, Any] = {}
    """The budget in words: what `budget` is the digest of."""
    weights: dict[str, str] = {}
    """sha256 of each folder of weights it stands on, by name."""
    points: tuple[Point, ...] = ()
    """By step; the last one is the result."""
    samples_per_sec: float | None = None
    """Of a run that was resumed: since then."""
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


class ComputePoint(Line):
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


L = TypeVar("L", bound=Line)


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
    """In the order in which they ended; none where there is no file.

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


def append(path: Path, line: Line) -> None:
    """The file holds the line whole or is as it was, whoever appends beside and whenever the machine dies."""
    with _locked(path):
        before = path.read_bytes() if path.exists() else b""
        with atomic_path(path) as temporary:
            temporary.write_bytes(before + line.model_dump_json().encode() + b"\n")


def finished(lines: Sequence[Line]) -> set[tuple[Any, ...]]:
    """Keys of what need not run again; what failed does."""
    return {line.key for line in lines if line.status == "ok"}
