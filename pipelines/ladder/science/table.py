"""OUT/results.jsonl -> OUT/table.md with a chart of each language model: scores, and the plan's six tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.ladder.claims import LEVEL, assess
from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.report import MISSING, show, show_change, show_p, table
from pipelines.ladder.science.charts import both_curves, by_llm, whether_it_can_show
from pipelines.ladder.science.plan import read_plan
from pipelines.ladder.science.results import FILE, Comparable, RowResult, comparable, read_results
from pipelines.ladder.statistics import Seeds
from repfusion.evaluation.suites.scenes import VALUES
from repfusion.files import write_text

FLOORS = ("position_floor", "strict_position_floor", "shuffled_overall")


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
    llms = by_llm(found.rows, {name: row.llm for name, row in REPFUSION.rows.items()})
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
                REPFUSION.rows[name].llm,
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
    for number, one in enumerate(assess(REPFUSION, scores), 1):
        difference = one.difference
        if difference is None:
            lines.append([str(number), one.claim.text, MISSING, "0", "-", "-", MISSING])
            continue
        shown = show_change(difference.mean, difference.error)
        pairs, p, adjusted = str(difference.num_pairs), show_p(one.p), show_p(one.adjusted)
        lines.append([str(number), one.claim.text, shown, pairs, p, adjusted, one.outcome])
    head = ["", "test", "difference", "pairs", "p", "p after Holm", ""]
    return (
        f"## The six tests\n\n{table(head, lines)}\nPaired by seed, one-sided t, Holm over the tests that "
        "have two pairs or more; all six are needed for the plan's own correction. Holds: below "
        f"{LEVEL:g}; reversed: the same of the opposite.\n"
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
