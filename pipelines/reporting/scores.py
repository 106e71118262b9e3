"""Evaluations -> the parts of the page that show them: facts, scores and images, whatever their suites."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipelines.reporting.charts import INK, Line, chart
from repfusion.display.tables import html
from repfusion.evaluation.record import GALLERY, Evaluation, SuiteResult
from repfusion.evaluation.shown import ShownSuite, shown_suites
from repfusion.evaluation.suites.base import Interval, Role, Value

SHOW = (
    "const all = this.closest('.steps').querySelectorAll('img');"
    "all.forEach((one, i) => one.classList.toggle('shown', i == this.value));"
    "this.previousElementSibling.value = this.dataset.steps.split(' ')[this.value]"
)
"""What the slider over the galleries does: it shows the picture of its step, and says which that is."""
ACCENT, MUTED = "#b5532a", "#8a8a90"


@dataclass(frozen=True)
class SuiteHistory:
    """One suite's results, by step."""

    suite: ShownSuite
    """The suite as the last evaluation shows it."""
    results: Sequence[tuple[int | None, SuiteResult]]
    evaluation: Evaluation
    """The last one."""

    def values(self, role: Role, part: str = "") -> list[Value]:
        """The values of a role, of a part or of the headline, that any of the results has, in the suite's
        order.
        """
        found = {name for _, result in self.results for name in result.scores.values}
        every = [one for one in self.suite.suite.values if one.name in found]
        return [one for one in every if one.role == role and one.of == part]

    def line(self, value: Value, colour: str, name: str, dashed: bool = False) -> Line:
        every = [(float(step or 0), result.scores.values.get(value.name)) for step, result in self.results]
        return Line(name, [(x, y) for x, y in every if y is not None], colour, dashed)


def histories(evaluations: Sequence[tuple[Path, Evaluation]]) -> list[SuiteHistory]:
    """The history of each suite of the last evaluation; `evaluations` are folders and contents, by step."""
    if not evaluations:
        return []
    last = evaluations[-1][1]
    return [
        SuiteHistory(
            suite,
            [(one.step, one.suites[suite.name]) for _, one in evaluations if suite.name in one.suites],
            last,
        )
        for suite in shown_suites(last)
    ]


def facts(evaluations: Sequence[tuple[Path, Evaluation]]) -> list[tuple[str, str]]:
    """Number and meaning: each suite's headline now, and how what is followed beside it has changed."""
    return [fact for history in histories(evaluations) for fact in _facts(history)]


def _facts(history: SuiteHistory) -> list[tuple[str, str]]:
    headline = history.suite.headline
    found = [(shown(headline.value, headline.share), headline.value.meaning or headline.value.title)]
    first, last = history.results[0][1].scores.values, history.results[-1][1].scores.values
    for value in history.values("beside"):
        if len(history.results) > 1 and value.name in first and value.name in last:
            unit = "%" if value.is_share else ""
            before = shown(value, first[value.name]).removesuffix("%")
            change = f"{before} &rarr; {shown(value, last[value.name]).removesuffix('%')}{unit}"
            found.append((change, value.meaning or value.title))
    return found


def shown(value: Value, number: float) -> str:
    """A share in percent, any other number as it is."""
    return f"{100 * number:.0f}%" if value.is_share else f"{number:.3g}"


def scores(evaluations: Sequence[tuple[Path, Evaluation]]) -> str:
    found = histories(evaluations)
    return "".join(_suite(one, f": {escape(one.suite.name)}" if len(found) > 1 else "") for one in found)


def _suite(history: SuiteHistory, name: str) -> str:
    sampler, last = history.evaluation.config.sampler, history.results[-1][1]
    suite = history.suite.suite
    about = re.sub(r"\*(.+?)\*", r"<i>\1</i>", escape(suite.about))
    return (
        f"<h2>Scores{name}</h2><p>Percent of {last.num_items} {escape(suite.subject)} {about}. "
        f"{sampler.num_steps} sampling steps, guidance {sampler.guidance_scale:g}. Step 0 is the checkpoint "
        f"that training started from.{_about_intervals(last)}</p>" + _charts(history) + _table(history)
    )


def _about_intervals(result: SuiteResult) -> str:
    return " Below a number: its 95% interval over prompts." if result.scores.intervals else ""


def _charts(history: SuiteHistory) -> str:
    """Headline, what is followed beside it and the floor in one; a small one for each part, likewise."""
    main = [
        *(history.line(one, INK, one.title) for one in history.values("headline")),
        *_beside(history, ""),
    ]
    numbers = "".join(
        chart([history.line(one, ACCENT, "")], 282, 130, title=one.title)
        for one in history.values("beside")
        if not one.is_share
    )
    small = "".join(
        chart(
            [history.line(one, INK, ""), *_beside(history, one.name)],
            282,
            130,
            title=one.title,
            y_range=(0, 1),
        )
        for one in history.suite.suite.values
        if one.role == "part"
    )
    return chart(main, 880, 240, "step", y_range=(0, 1)) + f'<div class="small">{small}{numbers}</div>'


def _beside(history: SuiteHistory, part: str) -> list[Line]:
    """The lines of what stands beside a part (or the headline), and of its floors, dashed."""
    colours: dict[Role, str] = {"beside": ACCENT, "floor": MUTED}
    return [
        history.line(one, colour, one.legend or one.title, dashed=role == "floor")
        for role, colour in colours.items()
        for one in history.values(role, part)
        if one.is_share
    ]


def _table(history: SuiteHistory) -> str:
    values = history.suite.suite.values
    rows = [
        (
            f"{step if step is not None else '?'}",
            *(
                percent(result.scores.values.get(value.name), result.scores.intervals.get(value.name))
                if value.is_share
                else number(result.scores.values.get(value.name))
                for value in values
            ),
        )
        for step, result in history.results
    ]
    return html(("step", *(value.title for value in values)), rows)


def number(value: float | None) -> str:
    """What is no share."""
    return "&ndash;" if value is None else f"{value:.3g}"


def percent(value: float | None, interval: Interval | None = None) -> str:
    """A share with a bar behind it, and its interval below."""
    if value is None:
        return "&ndash;"
    bar = f'<span class="bar" style="--share:{value:.3f}">{100 * value:.0f}</span>'
    if interval is None:
        return bar
    return f"{bar}<small>{100 * interval.low:.0f}&ndash;{100 * interval.high:.0f}</small>"


def galleries(evaluations: Sequence[tuple[Path, Evaluation]]) -> str:
    """The pictures of all evaluations under a slider over their steps, which begins at the last."""
    if not evaluations:
        return ""
    subjects = " and ".join(dict.fromkeys(one.suite.suite.subject for one in histories(evaluations)))
    is_graded = any(result.scores.by_item for _, one in evaluations for result in one.suites.values())
    frames = "; green frames are right, red ones wrong" if is_graded else ""
    parts = [f"<h2>Images</h2><p>Drawn from {escape(subjects)}{frames}.</p>"]
    steps = [one.step for _, one in evaluations]
    pictures = [image(folder / GALLERY, f"images of step {one.step}") for folder, one in evaluations]
    pictures[-1] = pictures[-1].replace("<img ", '<img class="shown" ', 1)
    if len(steps) == 1:
        return "".join([*parts, f'<div class="steps"><p>step {steps[0]}</p>{pictures[0]}</div>'])
    slider = (
        f'<label>step <output>{steps[-1]}</output><input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{" ".join(map(str, steps))}" oninput="{SHOW}"/></label>'
    )
    return "".join([*parts, f'<div class="steps">{slider}', *pictures, "</div>"])


def image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
