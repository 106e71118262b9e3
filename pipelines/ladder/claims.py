"""What docs/ladder/plan.md tests, as comparisons of rows; which of it scores show, which not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.ladder.rows import ROWS
from pipelines.ladder.statistics import Difference, Seeds, compare, holm, of_differences

LEVEL = 0.05
MARGIN = 0.03
"""Within this of a row, another counts as no better."""


@dataclass(frozen=True)
class Claim:
    """The first row scores above the second; of four, by more than the third above the fourth. `margin`
    turns it around: the first is not above the second by more than that.
    """

    text: str
    rows: tuple[str, ...]
    margin: float | None = None


CLAIMS = (
    Claim("a frozen MLLM that reads the noisy latents beats static queries", ("repfusion", "static_queries")),
    Claim(
        "so does one that perceives noised latents",
        ("repfusion_noise_taught", "static_queries_noise_taught"),
    ),
    Claim(
        "perceiving noised latents adds to what reading them gains",
        ("repfusion_noise_taught", "static_queries_noise_taught", "repfusion", "static_queries"),
    ),
    Claim("perception pretraining helps a frozen LLM", ("repfusion", "repfusion_language")),
    Claim("so does perceiving noised latents beside clean ones", ("repfusion_noise_taught", "repfusion")),
    Claim(
        f"queries read again at every step are no better, by {MARGIN:g}",
        ("timestep_queries", "static_queries"),
        MARGIN,
    ),
)
"""The six tests of the plan, in its order."""

DESCRIBED = (
    Claim(
        "a language-only LLM that reads the noisy latents beats its static queries",
        ("repfusion_language", "static_queries_language"),
    ),
    Claim("RepFusion beats static queries of the same FLOPs", ("repfusion", "static_queries_wide")),
    Claim("RepFusion beats TextEmbed of the same FLOPs", ("repfusion", "text_embed_wide")),
    Claim("a language-only LLM prefers to be tuned", ("repfusion_language_tuned", "repfusion_language")),
    Claim("an MLLM prefers to stay frozen", ("repfusion", "repfusion_tuned")),
    Claim(
        "tuning helps a language-only LLM more than an MLLM",
        ("repfusion_language_tuned", "repfusion_language", "repfusion_tuned", "repfusion"),
    ),
    Claim("RAE beats VAE for a static text condition", ("text_embed_language", "text_embed_vae")),
)
"""Comparisons that the plan describes and does not test."""

Outcome = Literal["holds", "not shown", "reversed", "missing"]


@dataclass(frozen=True)
class Assessment:
    """A claim's difference by pairs of seeds, and p, one-sided: by itself, and after Holm over all six; None
    where there are fewer than two pairs.
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


def assess(scores: Mapping[str, Seeds]) -> list[Assessment]:
    """A claim `holds` where p of the paired t test is below 5% after Holm over the claims that can be tested;
    `reversed`, the same of the opposite.
    """
    found = [difference_of(claim, scores) for claim in CLAIMS]
    ahead, behind = [], []
    for claim in CLAIMS:
        above = [one - (claim.margin or 0) for one in pairs_of(claim, scores)]
        below = [-one for one in above]
        ahead.append(_p(above if claim.margin is None else below))
        behind.append(_p(below if claim.margin is None else above))
    return [
        Assessment(claim, difference, p, adjusted, _outcome(difference, adjusted, opposite))
        for claim, difference, p, adjusted, opposite in zip(
            CLAIMS, found, ahead, holm(ahead), holm(behind), strict=True
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


def disagreements(means: Mapping[str, float], least: float = 0.015) -> tuple[int, list[tuple[str, str]]]:
    """How many pairs of rows the paper tells apart by more than `least` and we scored both, and those that we
    order the other way: (above in the paper, above here).
    """
    known = [(ROWS[row].paper, row) for row in means if row in ROWS]
    rated = [(paper, row) for paper, row in known if paper is not None]
    pairs = [(a, b) for x, a in rated for y, b in rated if x - y > least]
    return len(pairs), [(a, b) for a, b in pairs if means[a] < means[b]]
