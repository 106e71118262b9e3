"""OUT/results.jsonl -> OUT/table.md with a chart of each language model: scores, and the plan's six tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.ladder.claims import LEVEL, MARGIN
from pipelines.ladder.report import MISSING, show, show_change, show_p, table
from pipelines.ladder.science.charts import both_curves, by_llm, whether_it_can_show
from pipelines.ladder.science.plan import read_plan
from pipelines.ladder.science.results import FILE, Comparable, RowResult, comparable, read_results
from pipelines.ladder.science.rows import ROWS
from pipelines.ladder.statistics import Difference, Seeds, holm, of_differences
from repfusion.evaluation.suites.scenes import VALUES
from repfusion.files import write_text

FLOORS = ("position_floor", "strict_position_floor", "shuffled_overall")


@dataclass(frozen=True)
class PlannedTest:
    """The first row scores above the second; of four, by more than the third above the fourth. `margin` turns
    it around: the first is not above the second by more than that.
    """

    text: str
    rows: tuple[str, ...]
    margin: float | None = None


TESTS = (
    PlannedTest("`repfusion` above `static_queries`", ("repfusion", "static_queries")),
    PlannedTest(
        "`repfusion_noise_taught` above `static_queries_noise_taught`",
        ("repfusion_noise_taught", "static_queries_noise_taught"),
    ),
    PlannedTest(
        "the difference of 2 above that of 1",
        ("repfusion_noise_taught", "static_queries_noise_taught", "repfusion", "static_queries"),
    ),
    PlannedTest("`repfusion` above `repfusion_language`", ("repfusion", "repfusion_language")),
    PlannedTest("`repfusion_noise_taught` above `repfusion`", ("repfusion_noise_taught", "repfusion")),
    PlannedTest(
        f"`timestep_queries` not above `static_queries` by more than {MARGIN:g}",
        ("timestep_queries", "static_queries"),
        MARGIN,
    ),
)
"""The six of docs/ladder/plan.md, in its order."""


@dataclass(frozen=True)
class PlannedOutcome:
    """A test's difference by pairs of seeds, and p, one-sided: by itself, and after Holm over all six."""

    test: PlannedTest
    difference: Difference | None
    p: float | None
    adjusted: float | None


def assessed(scores: Mapping[str, Seeds]) -> list[PlannedOutcome]:
    """The six tests on the scores by row and seed; what has fewer than two pairs has no p."""
    pairs = [differences_of(test.rows, scores) for test in TESTS]
    ps = []
    for test, found in zip(TESTS, pairs, strict=True):
        asked = found if test.margin is None else [test.margin - one for one in found]
        ps.append(of_differences(asked).p_paired if asked else None)
    return [
        PlannedOutcome(test, of_differences(found) if found else None, p, adjusted)
        for test, found, p, adjusted in zip(TESTS, pairs, ps, holm(ps), strict=True)
    ]


def differences_of(rows: Sequence[str], scores: Mapping[str, Seeds]) -> list[float]:
    """Differences of two rows, or of two pairs of rows, over the seeds that all have."""
    own = [scores.get(row, {}) for row in rows]
    shared = sorted(set.intersection(*(set(one) for one in own)))
    signs = (1, -1, -1, 1)
    return [sum(sign * one[seed] for sign, one in zip(signs, own, strict=False)) for seed in shared]


def write_table(out: Path) -> Path:
    """Writes OUT/table.md and the charts beside it; returns the table's path.

    Raises:
        ValueError: there are no results, or a line is none.
    """
    results, plan = read_results(out / FILE), read_plan(out)
    if not results:
        raise ValueError(f"{out / FILE}: no results; `python -m pipelines.ladder.science` makes them")
    is_known = plan is not None and any(one.budget == plan.digest for one in results)
    found = comparable(results, plan.digest if plan is not None and is_known else None)
    llms = by_llm(found.rows, {name: row.llm for name, row in ROWS.items()})
    charts = {f"{llm}.svg": both_curves(llm, own) for llm, own in llms.items()}
    for name, svg in charts.items():
        if svg:
            write_text(out / name, svg)
    write_text(out / "table.md", render(found, llms, [name for name, svg in charts.items() if svg]))
    return out / "table.md"


def render(found: Comparable, llms: Mapping[str, Sequence[RowResult]], charts: Sequence[str]) -> str:
    """The page."""
    parts = ["# The ladder's second plan\n", _could_show(llms, charts), _setting(found)]
    if found.rows:
        parts += [_rows(found), _tasks(found), _tests(found.values("overall")), _losses(found)]
    return "\n".join(part for part in [*parts, _beside(found)] if part)


def _could_show(llms: Mapping[str, Sequence[RowResult]], charts: Sequence[str]) -> str:
    lines = [f"- {whether_it_can_show(llm, own)}\n" for llm, own in llms.items()]
    lacking = dict.fromkeys(text for own in llms.values() for one in own for text in one.shortfalls)
    if lacking:
        lines.append(
            "\nThe foundation does not reach what the plan asks of it, so its rows are no tests of the "
            f"claims: {'; '.join(lacking)}.\n"
        )
    pictures = "".join(f"\n![{Path(name).stem}]({name})\n" for name in charts)
    return f"## Whether the claim could show\n\n{''.join(lines)}{pictures}"


def _setting(found: Comparable) -> str:
    if not found.results:
        return ""
    first = found.results[0]
    machines = ", ".join(sorted({one.hardware for one in found.results}))
    commits = ", ".join(sorted({(one.commit or "none")[:7] for one in found.results}))
    return (
        f"Plan `{first.budget[:8]}` on foundation `{first.model[:8]}`: {first.num_steps:,} steps a row. "
        f"Hardware: {machines}. Commits: {commits}.\n"
    )


def _rows(found: Comparable) -> str:
    lines = []
    for name, results in found.rows.items():
        values = [one.scores["values"] for one in results]
        half = [one.half["values"]["overall"] for one in results if one.half]
        lines.append(
            [
                f"`{name}`",
                ROWS[name].llm,
                str(len(results)),
                show([one["overall"] for one in values]),
                limits(results, "overall"),
                show(half),
                *(
                    show([one[value] for one in values if value in one])
                    for value in ("strict_position", *FLOORS)
                ),
                show([one.curve[-1][1] for one in results if one.curve]),
                f"{(results[-1].num_trained or 0) / 1e6:.2f}M",
                f"{np.mean([one.steps_per_sec or 0 for one in results]):.1f}",
                f"{np.mean([one.seconds or 0 for one in results]):.0f}",
            ]
        )
    head = ["row", "LLM", "seeds", "overall", "95% over prompts", "at half", "strict position"]
    head += ["by chance", "strict by chance", "shuffled", "training loss", "trained", "steps/s", "seconds"]
    return (
        f"## Scores\n\n{table(head, lines)}\n± is the standard error over seeds; intervals are over prompts, "
        "their limits the means over seeds.\n"
    )


def limits(results: Sequence[RowResult], value: str) -> str:
    """Means over seeds of the limits of a value's interval."""
    found = [one.scores["intervals"][value] for one in results if value in one.scores["intervals"]]
    if not found:
        return MISSING
    low, high = (float(np.mean([one[end] for one in found])) for end in ("low", "high"))
    return f"{low:.3f} to {high:.3f}"


def _tasks(found: Comparable) -> str:
    parts = [value for value in VALUES if value.role == "part"]
    lines = []
    for name, results in found.rows.items():
        cells = []
        for part in parts:
            values = [one.scores["values"] for one in results]
            shown = show([one[part.name] for one in values if part.name in one])
            cells.append(f"{shown} ({limits(results, part.name)})")
        lines.append([f"`{name}`", *cells])
    return f"## By task\n\n{table(['row', *(part.title for part in parts)], lines)}"


def _tests(scores: Mapping[str, Seeds]) -> str:
    lines = []
    for number, one in enumerate(assessed(scores), 1):
        difference = one.difference
        if difference is None:
            lines.append([str(number), one.test.text, MISSING, "0", "-", "-", MISSING])
            continue
        outcome = "holds" if one.adjusted is not None and one.adjusted < LEVEL else "not shown"
        shown = show_change(difference.mean, difference.error)
        pairs, p, adjusted = str(difference.num_pairs), show_p(one.p), show_p(one.adjusted)
        lines.append([str(number), one.test.text, shown, pairs, p, adjusted, outcome])
    head = ["", "test", "difference", "pairs", "p", "p after Holm", ""]
    return (
        f"## The six tests\n\n{table(head, lines)}\nPaired by seed, one-sided t, Holm over the tests that "
        "have two pairs or more; all six are needed for the plan's own correction. Holds: below "
        f"{LEVEL:g}.\n"
    )


def _losses(found: Comparable) -> str:
    """What wrong prompts and none add, by row, at the noise levels of the first seed."""
    lines = []
    for name, results in found.rows.items():
        for t, one in results[0].paired.items():
            wrong = ", ".join(
                f"{kind} {mean:+.4f} ± {error:.4f}" for kind, (mean, error) in one["wrong"].items()
            )
            none = float(np.mean([mean for mean, _ in one["none"].values()]))
            lines.append([f"`{name}`", t, f"{one['right']:.4f}", wrong, f"{none:+.4f}"])
    head = ["row", "noise level", "right prompt", "wrong in", "no prompt"]
    return f"## Velocity losses\n\n{table(head, lines)}\nThe first seed's, paired by scene and noise.\n"


def _beside(found: Comparable) -> str:
    lines = [f"- failed: `{one.row}` seed {one.seed}: {one.error}" for one in found.failed]
    if found.num_others:
        lines.append(f"- left out, of another plan or foundation: {found.num_others}")
    return "## Not in the tables\n\n" + "\n".join(lines) + "\n" if lines else ""
