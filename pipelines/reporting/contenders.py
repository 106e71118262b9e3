"""Folders of evaluations -> what of them may be compared: the same suites and prompts, pair by pair."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from repfusion.evaluation.columns import ITEMS
from repfusion.evaluation.parts import Outputs
from repfusion.evaluation.record import SCORES, Evaluation, SuiteResult, read_evaluation
from repfusion.evaluation.suites.base import Interval
from repfusion.runs.folder import STEP_FOLDER, RunFolder, step_of
from repfusion.runs.named import trainings_below

DRAWS = 4000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Contender:
    """An evaluation that is compared with others."""

    name: str
    folder: Path
    evaluation: Evaluation
    history: Sequence[Evaluation]
    """Evaluations of the same training with this one, by step; those without a step are left out."""

    def drawn(self, suite: str) -> dict[str, "Drawn"]:
        """The items of a suite that were drawn, by their keys.

        Raises:
            ValueError: columns of the suite are missing or do not belong together.
        """
        folder = self.folder / suite
        if not (path := folder / ITEMS).is_file():
            raise ValueError(
                f"{path} is not there, which holds what was asked; name the training in place of a copy of "
                f"its scores, or evaluate {self.name} again"
            )
        try:
            items = [json.loads(line) for line in path.read_text().splitlines()]
            outputs = Outputs(folder, [item["num_outputs"] for item in items])
            outputs.check()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; evaluate {self.name} again") from error
        scores = self.evaluation.suites[suite].scores
        shares, reasons = scores.by_item, scores.reasons
        return {
            item["key"]: Drawn(item, outputs, index, shares.get(item["key"]), reasons.get(item["key"], ""))
            for index, item in enumerate(items)
        }


@dataclass(frozen=True, eq=False)
class Drawn:
    """An item, as its evaluation wrote it down, with what was drawn and judged."""

    item: dict[str, Any]
    outputs: Outputs
    index: int
    """Number of the item among those of its suite."""
    share: float | None
    """Share of its images that are right; None where the suite judges no single item."""
    reason: str
    """Why it is wrong; empty where it is right, or nothing is known."""

    @property
    def images(self) -> UInt8[np.ndarray, "n h w 3"]:
        """Images of the item, read now."""
        return self.outputs[self.index]

    @property
    def request(self) -> dict[str, Any]:
        """What decides what is drawn of it, beside noise and sampler."""
        return {key: value for key, value in self.item.items() if key != "truth"}


@dataclass(frozen=True)
class Pairing:
    """One suite of all contenders, on the items that they share."""

    suite: str
    contenders: Sequence[Contender]
    rows: Sequence[tuple[str, Sequence[Drawn]]]
    """Key, and what each contender drew of it, in the first one's order."""
    num_left_out: int
    """Items that not all of them drew, or drew of different requests."""

    def result(self, contender: Contender) -> SuiteResult:
        """What the suite found of a contender."""
        return contender.evaluation.suites[self.suite]

    def shares(self) -> Float[np.ndarray, "n c"]:
        """Share of each item's images that are right, by contender; items that one of them was not judged on
        are left out.
        """
        judged = [[one.share for one in row] for _, row in self.rows]
        whole = [row for row in judged if None not in row]
        return np.array(whole, np.float64).reshape(len(whole), len(self.contenders))

    def difference(self, index: int) -> tuple[float, Interval] | None:
        """A contender's mean share minus the first one's over the shared items, with its interval by the
        bootstrap over items; None where no item was judged.
        """
        shares = self.shares()
        return bootstrap(shares[:, index] - shares[:, 0]) if len(shares) else None


def bootstrap(values: Float[np.ndarray, " n"], draws: int = DRAWS) -> tuple[float, Interval]:
    """The mean of values and the percentile interval of it over draws of as many with replacement; the same
    values give the same interval.
    """
    random = np.random.default_rng(0)
    means = np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), Interval(low=float(low), high=float(high))


def contender_of(path: Path) -> Contender:
    """The evaluation that a path names: of a training or a workflow's root the last one.

    Raises:
        ValueError: there is none, or one that cannot be read.
    """
    found = evaluations_of(path)
    if not found:
        raise ValueError(
            f"{path}: no {SCORES}, neither in it nor in evaluations/ or evaluate/; name the folder of an "
            "evaluation, a training or a workflow that was evaluated"
        )
    folder, evaluation = found[-1]
    history = [one for _, one in found if one.step is not None]
    return Contender(str(path), folder, evaluation, history)


def evaluations_of(path: Path) -> list[tuple[Path, Evaluation]]:
    """Folders and contents of a path's evaluations, by step: its own, those of the training that it is, or
    those of the one training below it that was evaluated. A workflow's `evaluate/` holds the scores of these
    alone, without the images.

    Raises:
        ValueError: several trainings below it were evaluated, or an evaluation cannot be read.
    """
    if (own := _read(path)) is not None:
        return [(path, own)]
    if not path.is_dir():
        return []
    if RunFolder(path).checkpoints.is_dir():
        return _of_training(path)
    below = {root.parent: _of_training(root.parent) for root in trainings_below(path)}
    evaluated = {folder: read for folder, read in below.items() if read}
    if len(evaluated) > 1:
        names = ", ".join(map(str, evaluated))
        raise ValueError(f"{path}: {len(evaluated)} trainings were evaluated; name one: {names}")
    return next(iter(evaluated.values()), [])


def _of_training(folder: Path) -> list[tuple[Path, Evaluation]]:
    """The evaluations that a workflow made, or else those of `python -m repfusion.evaluation`."""
    return _steps_in(RunFolder(folder).evaluations) or _steps_in(folder / "evaluate")


def _steps_in(place: Path) -> list[tuple[Path, Evaluation]]:
    folders = [one for one in place.glob("step_*") if STEP_FOLDER.fullmatch(one.name)]
    every = [(folder, _read(folder)) for folder in sorted(folders, key=step_of)]
    return [(folder, one) for folder, one in every if one is not None]


def _read(folder: Path) -> Evaluation | None:
    try:
        return read_evaluation(folder)
    except ValueError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder / SCORES} is no evaluation of this version: {said}; evaluate again"
        ) from error


def pairings(contenders: Sequence[Contender]) -> list[Pairing]:
    """The suites that all contenders have, by the first one's order.

    Raises:
        ValueError: fewer than two contenders, or none of their suites or items is shared.
    """
    if len(contenders) < 2:
        raise ValueError(f"{len(contenders)} evaluation; expected at least two to compare")
    first, *others = contenders
    shared = [name for name in first.evaluation.suites if all(name in o.evaluation.suites for o in others)]
    if not shared:
        every = "; ".join(f"{one.name}: {', '.join(one.evaluation.suites)}" for one in contenders)
        raise ValueError(f"no suite is in all of the evaluations ({every})")
    return [_pairing(name, contenders) for name in shared]


def _pairing(suite: str, contenders: Sequence[Contender]) -> Pairing:
    drawn = [one.drawn(suite) for one in contenders]
    first, *others = drawn
    rows = [
        (key, [one, *(other[key] for other in others)])
        for key, one in first.items()
        if all(key in other and other[key].request == one.request for other in others)
    ]
    every = {key for one in drawn for key in one}
    if not rows:
        raise ValueError(f"suite {suite}: none of {len(every)} prompts was asked of all of the evaluations")
    return Pairing(suite, contenders, rows, len(every) - len(rows))


def differences_of_configs(contenders: Sequence[Contender]) -> list[str]:
    """Fields of the evaluations' configurations that decide what is drawn and are not the same in all."""
    found = []
    for field in ("seed", "sampler", "use_ema", "dropped_taps"):
        values = [one.evaluation.config.model_dump(mode="json")[field] for one in contenders]
        if any(value != values[0] for value in values):
            found.append(field)
    return found
