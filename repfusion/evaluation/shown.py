"""An evaluation -> lines of text, whichever suites it has."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from repfusion.evaluation.record import Evaluation
from repfusion.evaluation.suites.base import Count, Interval, Role, Suite, Value


@dataclass(frozen=True)
class Shown:
    """A value that a suite found, and how people see it."""

    value: Value
    share: float
    count: Count | None
    interval: Interval | None = None


@dataclass(frozen=True)
class ShownSuite:
    """A suite's values in its own order, those that it found."""

    name: str
    is_first: bool
    """Whether its headline picks the best checkpoint; its name need not be said."""
    suite: Suite
    values: Sequence[Shown]

    def of(self, role: Role, part: str = "") -> list[Shown]:
        """The values of a role that belong to a part, or to the headline."""
        return [one for one in self.values if one.value.role == role and one.value.of == part]

    @property
    def headline(self) -> Shown:
        return self.of("headline")[0]


def shown_suites(evaluation: Evaluation) -> Iterator[ShownSuite]:
    suites = evaluation.config.build_suites()
    for number, (name, result) in enumerate(evaluation.suites.items()):
        scores, suite = result.scores, suites[name]
        found = [value for value in suite.values if value.name in scores.values]
        values = [
            Shown(v, scores.values[v.name], scores.counts.get(v.name), scores.intervals.get(v.name))
            for v in found
        ]
        yield ShownSuite(name, not number, suite, values)


def in_brief(evaluation: Evaluation) -> str:
    """`overall 0.68, new concept 0.53`; further suites after their names."""
    return _joined(evaluation, lambda suite: ", ".join(map(_brief, [suite.headline, *suite.of("beside")])))


def by_part(evaluation: Evaluation) -> str:
    """`overall 0.680 (counting 0.60, position 0.58)`; further suites after their names."""
    return _joined(evaluation, _with_parts)


def as_lines(evaluation: Evaluation) -> list[str]:
    """Every value of every suite: parts with what they were counted from and what belongs to them, headline
    with its floor, others; intervals in square brackets.
    """
    lines: list[str] = []
    for suite in shown_suites(evaluation):
        lines += [] if suite.is_first else [f"{suite.name}:"]
        for part in suite.of("part"):
            own = [*suite.of("beside", part.value.name), *suite.of("floor", part.value.name)]
            lines.append(_counted(part.value.short_name, part) + _bracketed(own))
        lines.append(_line(suite.headline.value.title, suite.headline) + _bracketed(suite.of("floor")))
        lines += [_line(one.value.title, one) for one in suite.of("beside")]
    return lines


def _joined(evaluation: Evaluation, text: Callable[[ShownSuite], str]) -> str:
    suites = shown_suites(evaluation)
    return "; ".join(("" if suite.is_first else f"{suite.name}: ") + text(suite) for suite in suites)


def _brief(one: Shown) -> str:
    return f"{one.value.title} {one.share:.2f}"


def _with_parts(suite: ShownSuite) -> str:
    parts = ", ".join(f"{one.value.short_name} {one.share:.2f}" for one in suite.of("part"))
    return f"{suite.headline.value.title} {suite.headline.share:.3f}" + (f" ({parts})" if parts else "")


def _line(name: str, one: Shown) -> str:
    interval = "" if one.interval is None else f"  [{one.interval.low:.3f}, {one.interval.high:.3f}]"
    return f"{name:20} {one.share:.3f}{interval}"


def _counted(name: str, one: Shown) -> str:
    counted = "" if one.count is None else f"  ({one.count.correct}/{one.count.total})"
    return _line(name, one) + counted


def _bracketed(beside: Sequence[Shown]) -> str:
    texts = [f"{one.value.legend or one.value.title}: {one.share:.3f}" for one in beside]
    return f"  ({', '.join(texts)})" if texts else ""
