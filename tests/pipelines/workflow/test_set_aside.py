"""A training that another configuration sets aside: kept, under its own name, and taken up again when its
configuration comes back.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.dag import WholeStage
from pipelines.runtime.session import RayConfig
from pipelines.shards.manifest import MANIFEST, Upstream
from pipelines.shards.storage import Folder
from pipelines.workflow.collect import find_garbage
from pipelines.workflow.run import run


class Runs:
    """A workflow of data and one training, both of which only note that they ran."""

    def __init__(self, root: Path):
        self.root, self.said, self.data = root, [], "first"
        self.is_killed = False

    def stages(self, seed: int) -> tuple[WholeStage, WholeStage]:
        def make_data(above: Upstream) -> dict[str, Any]:
            return {"holds": self.data}

        def train(above: Upstream) -> dict[str, Any]:
            path = self.root / "train" / "steps"
            path.write_text((path.read_text() if path.exists() else "") + f"{seed} ")
            if self.is_killed:
                raise KeyboardInterrupt
            return {}

        def whole(name: str, fields: dict, above: tuple, execute: Callable[..., Any]) -> WholeStage:
            return WholeStage(name, fields, Folder(str(self.root / name)), above, execute, needs_ray=False)

        data = whole("data", {}, (), make_data)
        return data, whole("train", {"trainings.train.seed": seed}, (data,), train)

    def __call__(self, seed: int) -> str:
        """What the training's folder holds after a run."""
        self.said.clear()
        run(self.stages(seed), self.root, RayConfig(), self.said.append)
        return (self.root / "train" / "steps").read_text()

    def change_data(self, data: str) -> None:
        self.data = data
        (self.root / "data" / MANIFEST).unlink()

    @property
    def kept(self) -> list[str]:
        """What the set-aside trainings hold."""
        return sorted(path.read_text() for path in self.root.glob("train.stale-*/steps"))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "root")


def test_going_back_to_a_configuration_goes_back_to_its_training(runs):
    assert (runs(1), runs.kept) == ("1 ", [])
    assert (runs(2), runs.kept) == ("2 ", ["1 "])
    assert "train: stale: trainings.train.seed 1 -> 2; what it made is kept as train.stale-" in runs.said[1]
    assert (runs(1), runs.kept) == ("1 ", ["2 "])
    assert "is of this configuration and is train again" in runs.said[2] and "fresh, skipped" in runs.said[3]
    assert (runs(2), runs.kept) == ("2 ", ["1 "])
    assert (runs(3), runs.kept) == ("3 ", ["1 ", "2 "])


def test_one_that_was_interrupted_goes_on(runs):
    runs.is_killed = True
    with pytest.raises(KeyboardInterrupt):
        runs(1)
    runs.is_killed = False
    assert (runs(2), runs.kept) == ("2 ", ["1 "])
    assert (runs(1), runs.kept) == ("1 1 ", ["2 "])


def test_one_whose_data_changed_is_kept_and_not_gone_on_with(runs):
    runs(1)
    runs.change_data("second")
    assert (runs(1), runs.kept) == ("1 ", ["1 "])
    assert any("train: stale: the data of data changed" in line for line in runs.said)
    runs.change_data("third")
    assert (runs(1), runs.kept) == ("1 ", ["1 ", "1 "])
    # and with data as it was, the first of them is of this configuration again
    runs.change_data("second")
    assert (runs(1), runs.kept) == ("1 ", ["1 ", "1 "])
    assert "fresh, skipped" in runs.said[-1]


def test_a_run_that_was_killed_between_the_two_renames(runs):
    runs(1)
    (runs.root / "train").rename(runs.root / "train.stale-12345678")
    assert (runs(1), runs.kept) == ("1 ", [])


def test_a_name_that_is_taken_is_left_alone(runs):
    runs(1)
    runs(2)
    (taken,) = runs.root.glob("train.stale-*")
    shutil.rmtree(taken)
    taken.mkdir()
    (taken / "steps").write_text("mine")
    runs(1)
    runs(2)
    assert runs.kept == ["1 ", "mine"] and len(list(runs.root.glob("train.stale-*-2"))) == 1


def test_the_collector_knows_trainings(runs):
    runs(1)
    runs(2)
    found = find_garbage([runs.stages(2)], [runs.root])
    assert [(one.why, one.is_training) for one in found] == [("set aside", True)]
    found = find_garbage([runs.stages(2)[:1]], [runs.root])
    assert [(one.why, one.is_training) for one in found] == [
        ("no workflow given has this stage", True),
        ("set aside", True),
    ]
