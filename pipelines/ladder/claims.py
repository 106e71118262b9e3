"""The claims of a plan, as comparisons of rows; which of them scores show, which not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.ladder.plans.base import Claim, Plan
from pipelines.ladder.statistics import Difference, Seeds, compare, holm, of_differences

LEVEL = 0.05

Outcome = Literal["holds", "not shown", "reversed", "missing"]


@dataclass(frozen=True)
class Assessment:
    """A claim's difference by pairs of seeds, and p, one-sided: by itself, and after Holm over all of
    the plan; None where there are fewer than two pairs.
    """

    claim: Claim
    difference: Difference | None
    p: float | None
    adjusted: float | None
    outcome: Outcome


def difference_of(claim: Claim, scores: Mapping[str, Seeds]) -> Difference | None:
    """None where a row is missing."""
    if any(row not in scores for row in claim.rows):
        return None
    if len(claim.rows) == 2:
        return compare(scores[claim.rows[0]], scores[claim.rows[1]])
    pairs = pairs_of(claim, scores)
    return of_differences(pairs) if pairs else None


def pairs_of(claim: Claim, scores: Mapping[str, Seeds]) -> list[float]:
    """Differences of two rows, or of two pairs of rows, over the seeds that all have."""
    own = [scores.get(row, {}) for row in claim.rows]
    shared = sorted(set.intersection(*(set(one) for one in own)))
    signs = (1, -1, -1, 1)
    return [sum(sign * one[seed] for sign, one in zip(signs, own, strict=False)) for seed in shared]


def assess(plan: Plan, scores: Mapping[str, Seeds]) -> list[Assessment]:
    """A claim `holds` where p of the paired t test is below 5% after Holm over the claims that can be tested;
    `reversed`, the same of the opposite.
    """
    found = [difference_of(claim, scores) for claim in plan.claims]
    ahead, behind = [], []
    for claim in plan.claims:
        above = [one - (claim.margin or 0) for one in pairs_of(claim, scores)]
        below = [-one for one in above]
        ahead.append(_p(above if claim.margin is None else below))
        behind.append(_p(below if claim.margin is None else above))
    return [
        Assessment(claim, difference, p, adjusted, _outcome(difference, adjusted, opposite))
        for claim, difference, p, adjusted, opposite in zip(
            plan.claims, found, ahead, holm(ahead), holm(behind), strict=True
        )
    ]


def _p(differences: Sequence[float]) -> float | None:
    return of_differences(differences).p_paired if differences else None


def _outcome(difference: Difference | None, p: float | None, opposite: float | None) -> Outcome:
    if difference is None:
        return "missing"
    if p is not None and p < LEVEL:
        return "holds"
    return "reversed" if opposite is not None and opposite < LEVEL else "not shown"


def disagreements(
    plan: Plan, means: Mapping[str, float], least: float = 0.015
) -> tuple[int, list[tuple[str, str]]]:
    """How many pairs of rows the paper tells apart by more than `least` within one set-up and we scored both,
    and those that we order the other way: (above in the paper, above here).
    """
    known = [plan.rows[name] for name in means if name in plan.rows]
    rated = [(row.setup, row.paper, row.name) for row in known if row.paper is not None]
    pairs = [(a, b) for one, x, a in rated for other, y, b in rated if one == other and x - y > least]
    return len(pairs), [(a, b) for a, b in pairs if means[a] < means[b]]
