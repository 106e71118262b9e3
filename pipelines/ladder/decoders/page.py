"""Results of a plan -> `comparison.md`: a table of rows over their seeds, pictures, and what was not run."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.ladder.decoders.plan import TITLES, DecoderPlan, Row
from pipelines.ladder.decoders.result import DecoderResult
from repfusion.display.tables import markdown
from repfusion.files import write_text

PAGE = "comparison.md"
MEASURES = {
    "frechet_distance": ("Frechet distance", 3),
    "sharpness": ("sharpness", 3),
    "detector_agreement": ("detector agreement", 3),
    "psnr_db": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
}
"""Titles and decimals, in the order of the columns."""


def write_page(plan: DecoderPlan, lines: Sequence[DecoderResult]) -> None:
    """Writes the page of the results of this plan; rows that lack something, or failed, are listed."""
    plan.out.mkdir(parents=True, exist_ok=True)
    write_text(plan.out / PAGE, page_of(plan, lines))


def page_of(plan: DecoderPlan, lines: Sequence[DecoderResult]) -> str:
    """The page's text."""
    own = {row: results_of_row(plan, row, lines) for row in plan.rows}
    good = {row: [one for one in found if one.status == "ok"] for row, found in own.items()}
    parts = [
        "# Decoders compared",
        f"{plan.num_scenes} scenes that no training showed; {plan.recipe.length.num_steps} steps of "
        f"{plan.recipe.length.batch_size} images. Mean and standard deviation over seeds. Sharpness is the "
        "mean absolute Laplacian over that of the scenes: 1 is as sharp as they are. Frechet distances are "
        f"in the features of {plan.judge.path.name}, means over tokens.",
        table(good),
    ]
    if missing := not_run(plan, own):
        parts += ["Not run:", "\n".join(f"- {line}" for line in missing)]
    for row, found in good.items():
        if (picture := next((one.picture for one in found if one.picture), None)) is not None:
            parts += [f"## {TITLES[row]}", f"![scenes above what is made of them]({picture})"]
    return "\n\n".join(parts) + "\n"


def results_of_row(plan: DecoderPlan, row: Row, lines: Sequence[DecoderResult]) -> list[DecoderResult]:
    """The last result of each seed of a row, of this plan's budget and model."""
    if plan.lacks(row) is not None:
        return []
    named = row, plan.budget(), plan.model(row)
    found = {one.seed: one for one in lines if (one.row, one.budget, one.model) == named}
    return [found[seed] for seed in plan.seeds if seed in found]


def table(good: Mapping[Row, Sequence[DecoderResult]]) -> str:
    """A row for each that has results; columns that none measured are left out."""
    shown = [name for name in MEASURES if any(name in one.measures for own in good.values() for one in own)]
    head = ("decoder", "seeds", *(MEASURES[name][0] for name in shown), "parameters", "training (s)")
    rows = []
    for row, own in good.items():
        if not own:
            continue
        values = [_spread([one.measures[name] for one in own], MEASURES[name][1]) for name in shown]
        seconds = _spread([one.train_sec for one in own], 0)
        rows.append((TITLES[row], str(len(own)), *values, f"{own[0].num_parameters:,}", seconds))
    return markdown(head, rows) if rows else "No results yet."


def not_run(plan: DecoderPlan, own: Mapping[Row, Sequence[DecoderResult]]) -> list[str]:
    """Rows and seeds without a result, and why."""
    found = []
    for row, lines in own.items():
        if (reason := plan.lacks(row)) is not None:
            found.append(f"{TITLES[row]}: {reason}")
            continue
        found += [f"{TITLES[row]}, seed {one.seed}: {one.error}" for one in lines if one.status == "failed"]
        left = [str(seed) for seed in plan.seeds if seed not in [one.seed for one in lines]]
        found += [f"{TITLES[row]}: seeds {', '.join(left)} are due"] if left else []
    return found


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
