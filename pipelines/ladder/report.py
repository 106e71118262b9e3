"""Result files -> docs/ladder.md with its charts. Nothing but the files is read; `notes.md` beside them is
taken over as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.ladder.claims import LEVEL, assess, difference_of, disagreements
from pipelines.ladder.config import LadderConfig
from pipelines.ladder.curves import write_charts
from pipelines.ladder.plans.base import Plan, Row
from pipelines.ladder.results import ComputePoint, Result, Selection, read, select, select_points
from pipelines.ladder.statistics import Difference, compare, mean_and_error
from repfusion.display.tables import markdown
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.base import Suite
from repfusion.files import write_text

MISSING = "missing"


def write_report(config: LadderConfig, budget: str | None = None) -> Path:
    """Writes `config.report` and the charts into the folder of the same name; returns the report's path.

    Raises:
        ValueError: a result file is damaged, or there is no such budget.
    """
    selection = select(config.compared, read(config.results, Result), budget)
    points = select_points(read(config.compute_results, ComputePoint), selection)
    charts = config.report.with_suffix("")
    charts.mkdir(parents=True, exist_ok=True)
    names = write_charts(selection, points, charts)
    notes = charts / "notes.md"
    text = render(selection, points, [f"{charts.name}/{name}" for name in names])
    if notes.exists():
        text += f"\n## Notes\n\n{notes.read_text().strip()}\n"
    write_text(config.report, text)
    return config.report


def render(selection: Selection, points: Sequence[ComputePoint], charts: Sequence[str]) -> str:
    """The report without its notes."""
    parts = [
        f"# {selection.plan.title}\n",
        f"{selection.plan.about}; do not edit: `notes.md` beside the charts is taken over.\n",
    ]
    if not selection.results:
        parts += [f"No results yet: `{selection.plan.command}` makes them.\n", _planned(selection.plan)]
    else:
        parts += [_setting(selection), _ladders(selection)]
        parts += [_all_rows(selection), _tasks(selection), _curves(selection)]
        parts += [_claims(selection), _losses(selection), _order(selection)]
    parts += [_compute(selection, points), _open(selection)]
    parts += [f"![{Path(chart).stem}]({chart})\n" for chart in charts]
    return "\n".join(part for part in parts if part)


def _planned(plan: Plan) -> str:
    """The rows that are to run."""
    rows = [[row.label, _paper(row), str(row.num_seeds), MISSING] for row in plan.listed]
    return f"## All rows\n\n{table(['row', 'paper', 'seeds planned', 'score'], rows)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(head, rows) + "\n"


def suite_of(selection: Selection) -> Suite:
    """The suite whose headline is compared, as the results' own settings describe it."""
    final = selection.results[0].settings["scoring"]["final"]
    config = EvaluationConfig.model_validate({"suites": final["suites"], "seed": final["seed"]})
    return next(iter(config.build_suites().values()))


def show(values: Sequence[float]) -> str:
    """Mean and standard error; the mean alone of one value."""
    if not values:
        return MISSING
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def show_change(mean: float, error: float | None) -> str:
    """A difference with its sign, and the standard error where there is one."""
    return f"{mean:+.3f}" if error is None else f"{mean:+.3f} ± {error:.3f}"


def show_p(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}" if p >= 0.001 else "< 0.001"


def _setting(selection: Selection) -> str:
    first = selection.results[0]
    settings = first.settings
    training, scoring, dit = settings["training"], settings["scoring"], settings["dit"]
    engine, sampler = training["engine"], scoring["final"]["sampler"]
    scored_on = f"{first.points[-1].num_prompts} {suite_of(selection).subject}"
    machines = sorted({one.hardware for one in selection.results})
    commits = sorted({f"{(one.commit or 'none')[:7]}" for one in selection.results})
    hours = sum((one.train_sec or 0) + (one.score_sec or 0) for one in selection.results) / 3600
    return (
        f"Budget `{first.budget_name} {selection.budget and selection.budget[:8]}`: "
        f"{settings['num_samples']:,} scenes, {training['num_steps']:,} steps of "
        f"{training['global_batch_size']}, peak learning rate {engine['lr']:g} ({engine['schedule']}), DiT "
        f"{dit['depth']} x {dit['hidden_size']}, averaged weights ({training['ema_decay']}). Scored on "
        f"{scored_on}, {sampler['num_steps']} sampling steps, "
        f"guidance {sampler['guidance_scale']:g}; the same prompts and noise for all. Hardware: "
        f"{'; '.join(machines)}; {hours:.1f} hours of runs in all. Commits: {', '.join(commits)}.\n\n"
        "± is the standard error over seeds, which change initial weights, order and noise of training, not "
        "data and prompts: it says nothing about other prompts.\n"
    )


def _ladders(selection: Selection) -> str:
    scores, planned, parts = selection.scores, selection.plan.rows, []
    for name, steps in selection.plan.ladders.items():
        rows = []
        for step in steps:
            paper = planned[step.row].paper
            own = scores.get(step.row, {})
            adopted = "" if step.adopted else " (not adopted)"
            before = None if step.before is None else planned[step.before].paper
            change = "" if paper is None or before is None else shown_paper(paper - before, "+")
            difference = None if step.before is None else compare(own, scores.get(step.before, {}))
            if step.before is None:
                shown, agrees = "", ""
            elif difference is None:
                shown, agrees = MISSING, ""
            else:
                shown = show_change(difference.mean, difference.error)
                same = before is not None and paper is not None and (difference.mean > 0) == (paper > before)
                agrees = "yes" if same else "no"
            rows.append(
                [
                    f"{step.change}{adopted}",
                    "" if paper is None else shown_paper(paper),
                    change,
                    show(list(own.values())),
                    str(len(own)),
                    shown,
                    agrees,
                ]
            )
        head = ["row", "paper", "change", "here", "seeds", "change, paired by seed", "same direction"]
        parts.append(f"## {name}\n\n{table(head, rows)}")
    return "\n".join(parts)


def _all_rows(selection: Selection) -> str:
    found, rows = selection.rows, []
    floors = [value.name for value in suite_of(selection).values if value.role == "floor" and not value.of]
    for name, row in selection.plan.rows.items():
        results = found.get(name, [])
        if not results:
            rows.append([row.label, _paper(row), MISSING, "0", *[""] * (5 + len(floors))])
            continue
        last = results[-1]
        rates = [one.samples_per_sec for one in results if one.samples_per_sec is not None]
        rows.append(
            [
                row.label,
                _paper(row),
                show([one.score for one in results]),
                str(len(results)),
                *(show([one.points[-1].values[floor] for one in results]) for floor in floors),
                show([one.points[-1].validation_loss for one in results]),
                f"{(last.trainable_parameters or 0) / 1e6:.2f}M",
                f"{(last.flops_per_image or 0) / 1e9:.2f}",
                f"{sum(rates) / len(rates):.0f}" if rates else "",
                "none" if row.conditioning["method"] == "transfusion" else dit_of(last),
            ]
        )
    head = ["row", "paper", "score", "seeds", *["floor"] * len(floors), "validation loss", "trained"]
    head += ["GFLOPs an image", "samples/s", "DiT"]
    return (
        f"## All rows\n\n{table(head, rows)}\n"
        "Floor: the same images against other prompts. Validation loss: velocity on held-out scenes at fixed "
        "noise; comparable within RAE or within VAE, not between them. Samples/s are of the machine as it "
        "was, other runs beside it.\n"
    )


def dit_of(result: Result) -> str:
    return f"{result.dit['depth']} x {result.dit['hidden_size']}"


def shown_paper(value: float, sign: str = "") -> str:
    """A figure of a paper, with the two or three decimals that it gives."""
    return f"{value:{sign}.3f}".removesuffix("0")


def _paper(row: Row) -> str:
    return "" if row.paper is None else shown_paper(row.paper)


def _tasks(selection: Selection) -> str:
    parts = [value for value in suite_of(selection).values if value.role == "part"]
    rows = [
        [
            selection.plan.rows[row].label,
            *(show([one.points[-1].values[part.name] for one in results]) for part in parts),
        ]
        for row, results in selection.rows.items()
    ]
    return f"## By task\n\n{table(['row', *(part.title for part in parts)], rows)}"


def _curves(selection: Selection) -> str:
    steps = sorted({point.step for one in selection.results for point in one.points})
    rows = []
    for name, results in selection.rows.items():
        at: Mapping[int, list[float]] = {
            step: [point.score for one in results for point in one.points if point.step == step]
            for step in steps
        }
        rows.append([selection.plan.rows[name].label, *(show(at[step]) for step in steps)])
    sizes = {point.step: point.num_prompts for one in selection.results for point in one.points}
    shown = ", ".join(f"{step:,}: {sizes[step]}" for step in steps)
    return (
        f"## Score against step\n\n{table(['row', *(f'{step:,}' for step in steps)], rows)}\n"
        f"Prompts at each step: {shown}.\n"
    )


def _claims(selection: Selection) -> str:
    scores, plan = selection.scores, selection.plan
    tested = [
        [str(number), one.claim.text, *_difference(one.difference), show_p(one.adjusted), one.outcome]
        for number, one in enumerate(assess(plan, scores), 1)
    ]
    described = [[claim.text, *_difference(difference_of(claim, scores))] for claim in plan.described]
    head = ["difference", "seeds", "p paired t", "p Welch", "p signs", "p labels"]
    num_tests = sum(row[-2] != "-" for row in tested)
    return (
        f"## The claims\n\n{table(['claim', '', *head, 'p Holm', ''], tested)}\n"
        "p are one-sided, of so large a difference if there were none. Runs of one seed share order, "
        "captions, noise levels and prompts and are compared in pairs. *Holds*: p of the paired t test below "
        f"{LEVEL:g} after Holm's correction over the {num_tests} tests that have data; *reversed*: the same "
        "of the opposite. The exact tests assume no distribution, and few seeds bound them: n pairs cannot "
        "give less than 2^-n by signs (0.031 of 5), n against n not less than one in C(2n, n) by labels.\n\n"
        f"## Described, not tested\n\n{table(['', *head], described)}"
    )


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return [MISSING, "0", "-", "-", "-", "-"]
    ps = difference.p_paired, difference.p_welch, difference.p_exact, difference.p_labels
    return [
        show_change(difference.mean, difference.error),
        str(difference.num_pairs),
        *map(show_p, ps),
    ]


def _losses(selection: Selection) -> str:
    """The claims that one row beats another, by validation loss, where they share a latent space."""
    losses, plan, rows = selection.losses, selection.plan, []
    for claim in (*plan.claims, *plan.described):
        if len(claim.rows) > 2 or claim.margin or len({plan.rows[row].space for row in claim.rows}) > 1:
            continue
        first, second = (losses.get(row, {}) for row in claim.rows)
        difference = compare(second, first)
        if difference is None:
            continue
        change = show_change(-difference.mean, difference.error)
        rows.append([claim.text, change, str(difference.num_pairs), show_p(difference.p_paired)])
    if not rows:
        return ""
    return (
        "## The same by validation loss\n\n"
        f"{table(['', 'difference', 'seeds', 'p paired t'], rows)}\n"
        "Below zero the first row predicts the velocity of held-out scenes better, at all noise levels taken "
        "together; p, one-sided and not corrected, are of that. It need not follow prompts better.\n"
    )


def _order(selection: Selection) -> str:
    scores, planned = selection.scores, selection.plan.rows
    means = {row: mean_and_error(list(own.values()))[0] for row, own in scores.items()}
    total, wrong = disagreements(selection.plan, means)
    if not total:
        return ""
    lines = []
    for above, below in wrong:
        difference = compare(scores[below], scores[above])
        shown = "" if difference is None or difference.error is None else f" ± {difference.error:.3f}"
        lines.append(
            f"- {planned[above].label} ({_paper(planned[above])}, here {means[above]:.3f}) above "
            f"{planned[below].label} ({_paper(planned[below])}, here {means[below]:.3f}): here the other way "
            f"by {means[below] - means[above]:.3f}{shown}"
        )
    listed = "\n".join(lines) + "\n" if lines else "None.\n"
    return (
        f"## The paper's order\n\nOf {total} pairs of rows that the paper tells apart by 0.02 or more, "
        f"{total - len(wrong)} stand in the same order here. Those that do not:\n\n{listed}"
    )


def _compute(selection: Selection, points: Sequence[ComputePoint]) -> str:
    if not points and not selection.plan.sampled_again:
        return ""
    if not points:
        return "## Test-time compute\n\nNot run yet: `python -m pipelines.ladder compute`.\n"
    steps = sorted({point.num_steps for point in points})
    rows = []
    for name in [row for row in selection.plan.rows if any(point.row == row for point in points)]:
        own = [point for point in points if point.row == name]
        flops = {point.num_steps: point.flops_per_image or 0.0 for point in own}
        at = {step: [p.score for p in own if p.num_steps == step and p.score is not None] for step in steps}
        cells = [f"{show(at[n])} ({flops[n] / 1e9:.2f})" if at[n] else MISSING for n in steps]
        rows.append([selection.plan.rows[name].label, *cells])
    prompts = ", ".join(str(number) for number in sorted({point.num_prompts for point in points}))
    return (
        f"## Test-time compute\n\n{table(['sampling steps', *map(str, steps)], rows)}\n"
        f"Score (GFLOPs an image) of the final checkpoints on {prompts} prompts. More steps buy every row "
        "more compute; only in RepFusion's rows does the LLM spend it on what is being drawn.\n"
    )


def _open(selection: Selection) -> str:
    lines = [f"- failed: {one.row} seed {one.seed}: {one.error} ({one.time})" for one in selection.failed]
    if selection.other_weights:
        lines.append(f"- left out, made with other weights or another model: {len(selection.other_weights)}")
    for name, number in selection.other_budgets.items():
        lines.append(f"- left out, of the budget {name}: {number}")
    return "## Not in the tables\n\n" + "\n".join(lines) + "\n" if lines else ""
