"""One call: as much of foundation, rows and scores as fits into its seconds; the next one goes on."""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.results import append
from pipelines.ladder.rows import matched_dits
from pipelines.ladder.science.bench import Workbench, run_row
from pipelines.ladder.science.memory import NotEnoughMemory, check_memory, foundation_bytes, row_bytes
from pipelines.ladder.science.plan import SciencePlan, asked_plan, check_asked, read_plan, write_plan
from pipelines.ladder.science.results import FILE, read_results
from repfusion.config import load_config
from repfusion.files import digest_of
from repfusion.foundation.__main__ import PARTS, RECORD, Foundation, bring_up_to_date
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.deadline import OutOfTime, has_come
from repfusion.foundation.measure import LLAVAS
from repfusion.locks import locked

SLOWEST = ("static_queries_wide", "repfusion_tuned", "repfusion_large")
"""Rows of which one is the slowest: the largest DiT, the most trained weights, the largest language model."""
CLOSING_SEC = 30.0
"""Kept back at the end of a call, for scores of what was trained."""
MEASURING_SEC = 60.0
"""About what measuring the foundation takes on a GPU."""
LEAST_PERCEPTION, MOST_CAPTION_RATIO = 0.97, 1.02
"""What the plan asks of a foundation: accuracy of every kind of claim, and the largest caption loss over the
smallest.
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a call was asked for."""

    out: Path
    seconds: float
    config: Path
    """The foundation's."""
    overrides: Sequence[str]
    """KEY=VALUE of the plan."""
    rows: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    """None: as many as the plan has of each row."""
    row_seconds: float = 90.0
    """That the slowest row is to take, where the plan's steps are not given."""
    num_measured: int = 200
    """Texts of each kind on which the foundation is measured."""


def run_call(asked: Asked, say: Say = print) -> bool:
    """Does as much as fits into the seconds; returns whether all is done.

    Raises:
        ValueError: settings that do not hold, or other ones than the folder was begun with; no GPU, or too
            small a one; another call is at work in the folder.
    """
    clock, config = Clock(asked.seconds), load_config(FoundationConfig, asked.config)
    plan = asked_plan(config, asked.overrides)
    check_device(config, plan)
    if config.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with locked(asked.out / ".lock", "give another --out"):
        if (fixed := read_plan(asked.out)) is not None:
            check_asked(fixed, plan, asked.out)
        try:
            quality = bring_foundation_up(config, asked.out / "foundation", clock, asked.num_measured)
            release_memory()
            bench = Workbench(
                asked.out / "foundation", fixed or plan, torch.device(config.device), asked.out, clock.until
            )
            if fixed is None:
                bench.plan = fix_steps(bench, asked.row_seconds, say)
                write_plan(asked.out, bench.plan)
            run_rows(bench, REPFUSION.in_order(asked.rows, asked.seeds), quality, clock, say)
        except OutOfTime as left:
            say(f"time is over after {clock.spent:.0f} s: {left}; call again to go on")
            return False
    return True


def run_rows(
    bench: Workbench,
    wanted: Sequence[tuple[str, int]],
    quality: dict[str, Any],
    clock: "Clock",
    say: Say,
) -> None:
    """Runs what has no result yet; each is appended as soon as it is there.

    Raises:
        OutOfTime: the rest is left to the next call.
        NotEnoughMemory: the GPU's memory is full.
    """
    done, lacking = done_before(bench), shortfalls(quality)
    for name, seed in wanted:
        if (name, seed) in done:
            continue
        if has_come(clock.until):
            raise OutOfTime(f"{name}, seed {seed}, is not begun")
        llm = REPFUSION.rows[name].llm
        try:
            found = run_row(bench, name, seed, quality[llm], lacking[llm])
        except torch.OutOfMemoryError as error:
            size = bench.plan.batch_size
            raise NotEnoughMemory(
                f"{name}: the GPU's memory is full with batches of {size}, whatever the estimate said; give "
                f"batch_size={size // 2} and another --out"
            ) from error
        append(bench.out / FILE, found)
        bench.state(name, seed).unlink(missing_ok=True)
        release_memory()
        said = f"FAILED: {found.error}" if found.error else f"{found.score:.3f}"
        say(f"{name}, seed {seed}: {said} ({clock.spent:.0f} s)")
    say(f"all {len(wanted)} rows are done")


def check_device(config: FoundationConfig, plan: SciencePlan) -> None:
    """Raises ValueError where the foundation's device is not here, or too small for it or for the rows."""
    if config.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "the foundation's configuration says device cuda, and torch sees no GPU here; give "
            "--config repfusion/foundation/cpu.yaml, which takes hours, or call on a machine with a GPU"
        )
    free, _ = torch.cuda.mem_get_info()
    check_memory(*foundation_bytes(config), config.perception.batch_size, free, "the foundation")
    check_memory(*row_bytes(config, plan.dit, plan.num_scenes), plan.batch_size, free, "the largest row")


class Clock:
    """The seconds of one call."""

    def __init__(self, seconds: float):
        self.began, self.seconds = time.monotonic(), seconds
        self.until = self.began + max(seconds / 2, seconds - CLOSING_SEC)
        """When trainings stop."""

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def reserve(self, seconds: float, what: str) -> None:
        """Raises OutOfTime where so much is not left, but in the first half of a call: what never fits is
        begun there.
        """
        if self.spent > self.seconds / 2 and self.seconds - self.spent < seconds:
            raise OutOfTime(f"{what} takes about {seconds:.0f} s")


def bring_foundation_up(
    config: FoundationConfig, folder: Path, clock: Clock, num_measured: int
) -> dict[str, Any]:
    """Trains what is missing, measures it once, on so many texts of each kind, and returns what was found.

    Raises:
        ValueError: the folder holds a foundation of other sizes.
        OutOfTime: the rest is left to the next call.
    """
    bring_up_to_date(Foundation(config, folder, clock.until), tuple(p for p in PARTS if p != "measure"))
    record = folder / RECORD
    if "quality" not in json.loads(record.read_text()):
        clock.reserve(MEASURING_SEC, "measuring the foundation")
        bring_up_to_date(Foundation(config, folder, clock.until), ("measure",), num_measured)
    return json.loads(record.read_text())["quality"]


def shortfalls(quality: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """What each language model lacks of what the plan asks of it, in words."""
    losses = {name: quality[name]["caption_loss"] for name in (*LLAVAS, "language")}
    shared: list[str] = []
    if max(losses.values()) > MOST_CAPTION_RATIO * min(losses.values()):
        shared = [
            "caption losses differ by more than 2%: " + ", ".join(f"{n} {v:g}" for n, v in losses.items())
        ]
    found = {}
    for name in losses:
        low = {k: v for k, v in quality[name].get("train", {}).items() if v < LEAST_PERCEPTION}
        told = ", ".join(f"{kind} {accuracy:.3f}" for kind, accuracy in low.items())
        found[name] = (*([f"{name} perceives of clean images {told}"] if low else []), *shared)
    return found


def fix_steps(bench: Workbench, row_seconds: float, say: Say) -> SciencePlan:
    """The plan with its number of steps, from the slowest row's rate where it has none, and with DiTs matched
    in FLOPs.
    """
    bench.plan = plan = bench.plan.model_copy(
        update={"dits": matched_dits(REPFUSION, bench.plan.common(bench.foundation))}
    )
    if plan.num_steps:
        return plan
    bench.plan = plan.model_copy(update={"num_steps": plan.most_steps})
    rates = {name: steps_per_sec(bench, name) for name in SLOWEST}
    num_steps = max(1, min(plan.most_steps, int(row_seconds * min(rates.values()))))
    say(f"{num_steps} steps of {plan.batch_size} a row; steps/s: {rates}")
    return plan.model_copy(update={"num_steps": num_steps, "rates": rates})


def steps_per_sec(bench: Workbench, name: str) -> float:
    """The rate of a row in its first steps, a few of which warm up."""
    training = bench.training(name, 0, bench.out / "states" / "none")
    warm, timed = (5, 20) if bench.device.type == "cuda" else (1, 2)
    for step in range(warm):
        training.one_step(step)
    synchronize(bench.device)
    began = time.monotonic()
    for step in range(warm, warm + timed):
        training.one_step(step)
    synchronize(bench.device)
    return round(timed / (time.monotonic() - began), 3)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Lets go of what no name holds any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def done_before(bench: Workbench) -> set[tuple[str, int]]:
    """Rows and seeds that this plan on this foundation has a line of; a failed one would fail again."""
    mine = bench.plan.digest, digest_of(bench.digests)
    return {(one.row, one.seed) for one in read_results(bench.out / FILE) if (one.budget, one.model) == mine}
