"""Outputs and answers in parts: a crash costs what was not complete, processes share them out, and what is
found does not depend on how they are cut.
"""

import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from repfusion.evaluation import parts
from repfusion.evaluation.checkpoints import score_suite
from repfusion.evaluation.columns import asked, outputs_column
from repfusion.evaluation.parts import Outputs, Shares, parts_of
from repfusion.evaluation.suites.base import Item
from repfusion.locks import take
from repfusion.request import Request
from tests.extending.brightness import BrightnessConfig, BrightnessSuite

COLOURS = ("red", "green", "blue", "black", "white")


class Suite(BrightnessSuite):
    def items(self) -> list[Item]:
        return [Item(colour, Request(colour), num_outputs=2) for colour in self.colours]

    def __init__(self, colours: Sequence[str] = COLOURS):
        super().__init__(BrightnessConfig())
        self.colours = colours


class Grey:
    """Draws image i in grey i; ends where it is told to."""

    device = "cpu"

    def __init__(self, fails_at: int | None = None):
        self.drawn: list[int] = []
        self.fails_at = fails_at

    def check(self, items: Sequence[Item]) -> None:
        """Every item can be drawn."""

    def identity(self, items: Sequence[Item], first: int = 0) -> dict:
        return {"items": asked(items), "first": first}

    def __call__(self, items: Sequence[Item], first: int = 0) -> np.ndarray:
        if first == self.fails_at:
            raise MemoryError("no room")
        self.drawn.append(first)
        number = sum(item.num_outputs for item in items)
        return np.stack([np.full((2, 2, 3), first + one, np.uint8) for one in range(number)])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "IMAGES_A_PART", 4)


@pytest.mark.parametrize("num_outputs", [[1], [4, 4], [1, 5, 1, 1], [3] * 7, [9]])
def test_parts_hold_every_item_once_in_order_and_end_where_they_are_full(num_outputs: list[int]):
    found = parts_of(num_outputs)
    assert [index for part in found for index in part.items] == list(range(len(num_outputs)))
    assert [index for part in found for index in part.images] == list(range(sum(num_outputs)))
    for number, part in enumerate(found):
        own = num_outputs[part.items.start : part.items.stop]
        assert part.number == number and len(part.images) == sum(own) and sum(own[:-1]) < 4
        assert sum(own) >= 4 or part is found[-1]


def test_what_is_found_does_not_depend_on_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draws = Grey()
    cut = score_suite(Suite(), tmp_path / "cut", draws)
    assert draws.drawn == [0, 4, 8]
    monkeypatch.setattr(parts, "IMAGES_A_PART", 100)
    whole = score_suite(Suite(), tmp_path / "whole", Grey())
    assert cut.scores == whole.scores
    for index in range(len(COLOURS)):
        np.testing.assert_array_equal(cut.outputs[index], whole.outputs[index])
    assert cut.outputs[3].reshape(2, -1)[:, 0].tolist() == [6, 7]


def test_after_a_crash_complete_parts_are_not_made_again(tmp_path: Path):
    cut_short = Grey(fails_at=8)
    with pytest.raises(MemoryError):
        score_suite(Suite(), tmp_path, cut_short)
    assert cut_short.drawn == [0, 4] and not (tmp_path / "scores.json").exists()
    again = Grey()
    found = score_suite(Suite(), tmp_path, again)
    assert again.drawn == [8]
    assert found.scores == score_suite(Suite(), tmp_path / "calm", Grey()).scores
    assert not list(tmp_path.rglob("*.lock"))


def test_one_item_that_changes_is_drawn_again_with_its_part_alone(tmp_path: Path):
    score_suite(Suite(), tmp_path, Grey())
    draws = Grey()
    score_suite(Suite(("red", "green", "blue", "black", "violet")), tmp_path, draws)
    assert draws.drawn == [8]


def test_who_helps_leaves_the_parts_that_others_are_at_and_who_finishes_takes_them_over(tmp_path: Path):
    lock = take(outputs_column(tmp_path, 1).path.with_suffix(".lock"))
    assert lock is not None
    helper, last = Grey(), Grey()
    items = Suite().items()
    assert Shares(Suite(), items, tmp_path, helper, lambda work: work()).help() == 2
    assert helper.drawn == [0, 8]
    finishing = Shares(Suite(), items, tmp_path, last, lambda work: work())
    thread = threading.Thread(target=finishing.finish)
    thread.start()
    thread.join(3 * parts.WAIT_SEC)
    assert thread.is_alive() and last.drawn == []
    lock.close()  # as when its process ends
    thread.join(60)
    assert not thread.is_alive() and last.drawn == [4]
    assert len(finishing.answers()) == len(COLOURS)


def _help(folder: Path, made) -> None:
    parts.IMAGES_A_PART = 4
    suite = Suite([str(number) for number in range(60)])
    made.put(Shares(suite, suite.items(), folder, Grey(), lambda work: work()).help())


@pytest.mark.slow
def test_processes_make_each_part_once(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    made = context.Queue()
    processes = [context.Process(target=_help, args=(tmp_path, made)) for _ in range(3)]
    for one in processes:
        one.start()
    found = [made.get(timeout=120) for _ in processes]
    for one in processes:
        one.join()
    assert sum(found) == 30
    draws, suite = Grey(), Suite([str(number) for number in range(60)])
    assert score_suite(suite, tmp_path, draws).outputs[59][1].flat[0] == 119 and draws.drawn == []


def test_images_that_are_not_there_or_damaged_are_named(tmp_path: Path):
    score_suite(Suite(), tmp_path, Grey())
    outputs = Outputs(tmp_path, [2] * 5)
    outputs.check()
    with pytest.raises(ValueError, match=r"00002\.npy: 2 images; 2 items ask for 4"):
        Outputs(tmp_path, [2] * 6).check()
    path = outputs_column(tmp_path, 1).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.npy"):
        outputs[2]
    path.unlink()
    with pytest.raises(ValueError, match=r"00001\.npy is not there"):
        outputs.check()
