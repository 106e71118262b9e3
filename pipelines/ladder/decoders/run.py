"""A plan -> its rows, one training at a time, each a line of `results.jsonl` once it is measured. One that
was cut off goes on from its state; what is there is not made again.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

from pipelines.ladder.decoders.measure import DecoderBench
from pipelines.ladder.decoders.page import write_page
from pipelines.ladder.decoders.plan import DecoderPlan, Row
from pipelines.ladder.decoders.result import DecoderResult
from pipelines.ladder.results import append, finished, read
from repfusion.decoding.train import EXAMPLES, train_decoder
from repfusion.generation.device import usable_device
from repfusion.latents.load import fitting_decoder
from repfusion.training.engine import NonFiniteError


def results_of(plan: DecoderPlan) -> Path:
    """The file of results."""
    return plan.out / "results.jsonl"


def due(plan: DecoderPlan) -> list[tuple[Row, int]]:
    """Trainings that are to be made, seed by seed, so that all rows are there early; those that lack what
    judges them are none.
    """
    done = finished(read(results_of(plan), DecoderResult))
    budget = plan.budget()
    rows: list[Row] = [row for row in plan.rows if plan.lacks(row) is None]
    models = {row: plan.model(row) for row in rows}
    pairs: list[tuple[Row, int]] = [(row, seed) for seed in plan.seeds for row in rows]
    return [(row, seed) for row, seed in pairs if (row, seed, budget, models[row]) not in done]


def run_plan(plan: DecoderPlan, most: int | None = None) -> list[DecoderResult]:
    """Makes the trainings that are due, `most` of them at most; returns theirs, and writes the page.

    Raises:
        ValueError: a folder of the plan holds something else, or does not fit.
    """
    made: list[DecoderResult] = []
    bench = DecoderBench(plan, usable_device(plan.recipe.device))
    for row, seed in due(plan)[:most]:
        made.append(run_row(plan, bench, row, seed))
        append(results_of(plan), made[-1])
        write_page(plan, read(results_of(plan), DecoderResult))
    write_page(plan, read(results_of(plan), DecoderResult))
    return made


def run_row(plan: DecoderPlan, bench: DecoderBench, row: Row, seed: int) -> DecoderResult:
    """Trains and measures one decoder; a loss that is not finite is a failed result, which runs anew."""
    training, started = plan.training(row, seed), time.monotonic()
    fields = {"row": row, "seed": seed, "budget_name": "decoders", "budget": plan.budget()}
    fields |= {"model": plan.model(row)}
    try:
        train_decoder(training)
    except NonFiniteError as error:
        return DecoderResult(**fields, status="failed", error=str(error), time=_now())
    seconds = time.monotonic() - started
    decoder = fitting_decoder(training.out, bench.encoder.grid, bench.encoder.feature_dim)
    return DecoderResult(
        **fields,
        time=_now(),
        measures=bench.measures(decoder),
        num_parameters=sum(p.numel() for p in decoder.parameters()),
        train_sec=round(seconds, 1),
        picture=str((training.out / EXAMPLES).relative_to(plan.out)),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
