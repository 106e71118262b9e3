"""How far a stage or a training is, as the driver shows it: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from tqdm import tqdm

from pipelines.shards.store import Sidecar

LINE_SEC = 15.0
"""Between lines where the terminal shows no bar; the first stands at once."""


def say_line(text: str) -> None:
    print(text, flush=True)


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Lines:
    """A line at most every LINE_SEC."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]):
        self.say, self.clock, self.due = say, clock, 0.0

    def __call__(self, text: Callable[[], str]) -> None:
        if self.clock() >= self.due:
            self.due = self.clock() + LINE_SEC
            self.say(text())


class StageProgress:
    """Shards and samples of a data stage, for the length of a block.

    Args:
        stage: its name.
        total, done: shards in all, and those that were complete before.
        is_terminal: whether to show a bar; None asks the error stream.
        say: takes the lines.
        clock: seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        done: int = 0,
        is_terminal: bool | None = None,
        say: Callable[[str], None] = say_line,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage, self.total, self.first, self.done = stage, total, done, done
        self.samples, self.clock, self.started = 0, clock, clock()
        self.is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self.lines = _Lines(say, clock)
        self.lines.due = clock() + LINE_SEC
        self.bar = tqdm(
            total=total, initial=done, desc=stage, unit="shard", leave=False, disable=not self.is_terminal
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def completed(self, made: object) -> None:
        """One shard more; its samples count, and those that were dropped from it, where a sidecar says so: a
        check of shards makes none.
        """
        self.done += 1
        self.samples += made.entries if isinstance(made, Sidecar) else 0
        rate = self.samples / max(self.clock() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{self.samples:,} samples, {rate:.1f}/s", refresh=False)
        self.bar.update()
        if not self.is_terminal and self.done < self.total:
            self.lines(lambda: f"{self.stage}: {self.text(rate)}")

    def text(self, rate: float) -> str:
        """`3/8 shards, 1,500 samples, 52.0/s, 2 min left`."""
        spent = self.clock() - self.started
        left = spent / (self.done - self.first) * (self.total - self.done)
        return (
            f"{self.done}/{self.total} shards, {self.samples:,} samples, {rate:.1f}/s, {duration(left)} left"
        )


class TrainingProgress:
    """Steps of a training from what its rank 0 last wrote, for the length of a block.

    Args:
        first_step: what was trained before.
        num_steps: where it ends.
        is_terminal, say, clock: as of StageProgress.
    """

    def __init__(
        self,
        first_step: int,
        num_steps: int,
        is_terminal: bool | None = None,
        say: Callable[[str], None] = say_line,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.num_steps, self.step, self.clock = num_steps, first_step, clock
        self.is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self.lines, self.began = _Lines(say, clock), (first_step, clock())
        self.has_begun = False
        self.bar = tqdm(
            total=num_steps, initial=first_step, desc="train", unit="step", disable=not self.is_terminal
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, report: Mapping[str, Any]) -> bool:
        """Shows a report, which has a loss from the first log line on; whether it is of another step than
        the one before.
        """
        step = report["step"]
        if step == self.step:
            return False
        if not self.has_begun:  # loading is no training: the time of steps counts from the first one seen
            self.has_begun, self.began = True, (step, self.clock())
        self.bar.update(step - self.step)
        self.step = step
        if "loss" in report:
            loss, rate = report["loss"], report["samples_per_sec"]
            self.bar.set_postfix(loss=f"{loss:.4f}", samples_per_sec=f"{rate:.0f}")
        if not self.is_terminal:
            self.lines(lambda: f"train: {self.text(report)}")
        return True

    def text(self, report: Mapping[str, Any]) -> str:
        """`step 42/600, 3 min left, loss 0.4211, 210 samples/s`, as far as it is known."""
        parts = [f"step {self.step}/{self.num_steps}"]
        if (trained := self.step - self.began[0]) > 0:
            left = (self.clock() - self.began[1]) / trained * (self.num_steps - self.step)
            parts.append(f"{duration(left)} left")
        if "loss" in report:
            parts += [f"loss {report['loss']:.4f}", f"{report['samples_per_sec']:.0f} samples/s"]
        return ", ".join(parts)
