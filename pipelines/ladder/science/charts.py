"""What a language model perceives, and where a prompt decides the loss, by noise level: whether RepFusion's
claim could show at all.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipelines.ladder.curves import COLOURS, HEIGHT, START, WIDTH
from pipelines.ladder.science.results import RowResult
from pipelines.reporting.charts import Line, chart

Curve = list[tuple[float, float]]
TOLD = 0.75
"""Accuracy from which on a kind of claim counts as told: halfway between chance and always."""
DECIDED = 0.5
"""Share of the most that a wrong prompt adds at any level from which on it counts as deciding the loss."""


def perceived(result: RowResult) -> dict[str, Curve]:
    """Accuracy by kind of claim and noise level, clean latents at 0; empty for a model that sees nothing."""
    found = result.perception
    if "by_noise_level" not in found:
        return {}
    levels = {0.0: found["train"], **{float(t): one for t, one in found["by_noise_level"].items()}}
    kinds = {kind: None for one in levels.values() for kind in one}
    return {kind: [(t, one[kind]) for t, one in sorted(levels.items()) if kind in one] for kind in kinds}


def decided(results: Sequence[RowResult]) -> dict[str, Curve]:
    """What a wrong prompt adds to the loss, by kind and noise level: the mean over seeds."""
    kinds = results[0].paired.values()
    found: dict[str, Curve] = {kind: [] for one in kinds for kind in one["wrong"]}
    for kind, curve in found.items():
        for t in results[0].paired:
            curve.append((float(t), float(np.mean([one.paired[t]["wrong"][kind][0] for one in results]))))
        curve.sort()
    return found


def shares(curve: Curve) -> Curve:
    """Values as shares of the largest; none where nothing is above 0."""
    most = max((y for _, y in curve), default=0.0)
    return [(x, y / most) for x, y in curve] if most > 0 else []


def both_curves(llm: str, results: Sequence[RowResult]) -> str:
    """An SVG: by kind, how well it is told and, dashed, the share of its most that a wrong prompt adds."""
    told, adds = perceived(results[0]), decided(results)
    lines = []
    for number, kind in enumerate(adds):
        colour = COLOURS[number % len(COLOURS)]
        seen = [(t, max(0.0, 2 * accuracy - 1)) for t, accuracy in told.get(kind, [])]
        lines.append(Line(kind, seen, colour))
        lines.append(Line("" if seen else kind, shares(adds[kind]), colour, dashed=True))
    title = f"{llm}: told right from wrong, 1 always; dashed: a wrong prompt's loss, 1 its most"
    svg = chart(lines, WIDTH, HEIGHT, "noise level", title, y_range=(-0.05, 1.05))
    return svg.replace("<svg ", START, 1) + "\n" if svg else ""


def whether_it_can_show(llm: str, results: Sequence[RowResult]) -> str:
    """A sentence: up to which noise level each kind is told, and from which on a prompt decides its loss."""
    told, adds = perceived(results[0]), decided(results)
    if not told:
        return f"`{llm}` was never taught to see."
    parts, can_show, is_asked = [], False, False
    for kind, curve in adds.items():
        seen = {t for t, accuracy in told.get(kind, []) if accuracy >= TOLD}
        asked = {t for t, share in shares(curve) if share >= DECIDED}
        can_show, is_asked = can_show or bool(seen & asked), is_asked or bool(asked)
        parts.append(f"{kind} told {_span('up to', seen, max)}, asked {_span('from', asked, min)}")
    if can_show:
        verdict = "there are levels at which a claim is told and its prompt decides the loss"
    elif is_asked:
        verdict = (
            "**the claim cannot show**: where a prompt decides the loss, no claim is told right from wrong"
        )
    else:
        verdict = "no prompt decides any loss: its first row has not learned to follow them"
    return f"`{llm}`: {verdict}. By noise level: {'; '.join(parts)}."


def _span(word: str, levels: set[float], end: Callable[[set[float]], float]) -> str:
    return f"{word} {end(levels):.2f}" if levels else "nowhere"


def by_llm(rows: Mapping[str, Sequence[RowResult]], llms: Mapping[str, str]) -> dict[str, list[RowResult]]:
    """The results of each language model's first row, in the plan's order."""
    found: dict[str, list[RowResult]] = {}
    for row, results in rows.items():
        found.setdefault(llms[row], list(results))
    return found
