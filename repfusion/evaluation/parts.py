"""A suite's items in parts of so many images, whose outputs and answers are files of their own: what is
complete stays after a crash, no part is held in memory beside another, and processes share parts out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from repfusion.evaluation.columns import answers_column, known, outputs_column
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Suite
from repfusion.files import digest_of
from repfusion.locks import take

IMAGES_A_PART = 120
"""A part ends with the item that reaches so many images."""
WAIT_SEC = 0.5
"""Between two looks at parts that others are at."""
Run = Callable[[Callable[[], Any]], Any]
"""Calls a piece of work, here or in a thread of its choice."""


@dataclass(frozen=True)
class SuitePart:
    """Items beside each other."""

    number: int
    """Number of the part, from 0."""
    items: range
    """Indices of the items."""
    images: range
    """Indices of the images of these items among those of all."""


def parts_of(num_outputs: Sequence[int]) -> list[SuitePart]:
    """The parts of items that ask for so many images each, in order."""
    parts: list[SuitePart] = []
    item, image = 0, 0
    for index, end in enumerate(np.cumsum(num_outputs).tolist(), start=1):
        if end - image >= IMAGES_A_PART or index == len(num_outputs):
            parts.append(SuitePart(len(parts), range(item, index), range(image, end)))
            item, image = index, end
    return parts


def per_item(images: UInt8[np.ndarray, "n h w 3"], items: Sequence[Item]) -> list[list[Image]]:
    """The images of each item.

    Raises:
        ValueError: where there are not as many as the items ask for.
    """
    return [list(part) for part in _split(images, [item.num_outputs for item in items])]


def _split(images: UInt8[np.ndarray, "n h w 3"], num_outputs: Sequence[int]) -> list[np.ndarray]:
    ends = np.cumsum(num_outputs)
    if not len(ends) or ends[-1] != len(images):
        asked = ends[-1] if len(ends) else 0
        raise ValueError(f"{len(images)} images; {len(num_outputs)} items ask for {asked}")
    return np.split(images, ends[:-1])


class Outputs:
    """The images of a suite's items, read when they are asked for.

    Args:
        folder: the suite's.
        num_outputs: how many images each item asks for.
    """

    def __init__(self, folder: Path, num_outputs: Sequence[int]):
        self.folder, self.num_outputs = folder, num_outputs
        self.parts = parts_of(num_outputs)
        self._part_of = [part for part in self.parts for _ in part.items]

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "k h w 3"]:
        """The images of an item. Raises ValueError as `check` does, for its part."""
        part = self._part_of[index]
        return np.array(self._read(part)[index - part.items.start])

    def check(self) -> None:
        """Raises ValueError where a part is not there, is damaged or holds another number of images."""
        for part in self.parts:
            self._read(part)

    def _read(self, part: SuitePart) -> list[np.ndarray]:
        """The images of each item of a part, mapped."""
        path = outputs_column(self.folder, part.number).path
        if not path.is_file():
            raise ValueError(f"{path} is not there, which holds what was drawn")
        try:
            images = np.load(path, mmap_mode="r")
            return _split(images, [self.num_outputs[one] for one in part.items])
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error


class Draws(Protocol):
    """Draws what items ask for."""

    @property
    def device(self) -> str:
        """The torch device on which is drawn, and judged."""
        ...

    def check(self, items: Sequence[Item]) -> None:
        """Raises ValueError where an item cannot be drawn, before hours of others are."""
        ...

    def identity(self, items: Sequence[Item], first: int = 0) -> dict[str, Any]:
        """What decides the images of items, the first of which is image `first` of all."""
        ...

    def __call__(self, items: Sequence[Item], first: int = 0) -> UInt8[np.ndarray, "n h w 3"]:
        """The images of items, each item's outputs beside each other."""
        ...


class Shares:
    """Brings outputs and answers of a suite up to date, part by part: outputs where the items or what draws
    them changed, answers where outputs or judge did. A part that another process is at is left to that.

    Args:
        suite: what is asked for, and how it is judged.
        items: its items, or the first so many.
        folder: where its columns lie; shared by all processes that are at it.
        draws: a model that draws.
        run: calls each piece of work.
    """

    def __init__(self, suite: Suite, items: Sequence[Item], folder: Path, draws: Draws, run: Run):
        self.suite, self.items, self.folder, self.draws, self.run = suite, items, folder, draws, run
        self.outputs = Outputs(folder, [item.num_outputs for item in items])
        self.parts = self.outputs.parts
        self.num_answered = 0
        self._judge: Judge | None = None
        self._is_checked = False

    def help(self) -> int:
        """Makes the parts that nobody is at, and returns how many it has answered."""
        for part in self.parts:
            self._bring_up(part)
        return self.num_answered

    def finish(self) -> None:
        """Makes the parts that nobody is at, and waits for the others; those of a process that ended without
        completing them are made here.
        """
        left = self.parts
        while held := [part for part in left if not self._bring_up(part)]:
            if len(held) == len(left):
                time.sleep(WAIT_SEC)
            left = held

    def answers(self) -> list[Answer]:
        """The answer for each item, once all parts are complete."""
        columns = [answers_column(self.folder, part.number) for part in self.parts]
        return [answer for column in columns for answer in column.read(column.path)]

    def digest(self) -> str:
        """Digest of all answers, once all parts are complete."""
        return digest_of([answers_column(self.folder, part.number).digest() for part in self.parts])

    def _bring_up(self, part: SuitePart) -> bool:
        """False where another process is at the part."""
        outputs, answers = (column(self.folder, part.number) for column in (outputs_column, answers_column))
        lock = outputs.path.with_suffix(".lock")
        if (held := take(lock)) is None:
            return False
        with held:
            items = self.items[part.items.start : part.items.stop]
            draw = partial(self._draw, items, part.images.start)
            images = outputs.get(self.draws.identity(items, part.images.start), draw)
            judged = {
                "outputs": outputs.digest(),
                "items": digest_of(known(items)),
                "judge": self.suite.judge_version,
            }
            answers.get(judged, partial(self.run, partial(self._answer, items, images)))
            lock.unlink(missing_ok=True)
        return True

    def _draw(self, items: Sequence[Item], first: int) -> UInt8[np.ndarray, "n h w 3"]:
        if not self._is_checked:
            self.draws.check(self.items)
            self._is_checked = True
        return self.draws(items, first)

    def _answer(self, items: Sequence[Item], images: UInt8[np.ndarray, "n h w 3"]) -> list[Answer]:
        if self._judge is None:
            self._judge = self.suite.judge(self.draws.device)
        self.num_answered += 1
        return self._judge(items, per_item(images, items))
