"""What a reproduction must show, as comparisons of rows; which of it our scores show, which not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.ladder.rows import ROWS
from pipelines.ladder.statistics import Difference, Seeds, compare, holm, of_differences

LEVEL = 0.05
MARGIN = 0.03
"""Within this of a row, another counts as no better."""


@dataclass(frozen=True)
class Claim:
    """`greater`: the first row scores above the second. `no_better`: it does not, by more than MARGIN.
    `flip`: the first exceeds the second by more than the third exceeds the fourth.
    """

    number: str
    text: str
    kind: Literal["greater", "no_better", "flip"]
    rows: tuple[str, ...]


CLAIMS = (
    Claim(
        "1",
        "a frozen MLLM that reads the noisy latents beats static queries",
        "greater",
        ("repfusion", "static_queries"),
    ),
    Claim(
        "1",
        "a frozen language-only LLM that reads them beats its own static queries",
        "greater",
        ("noisy_rae", "static_queries_language"),
    ),
    Claim(
        "1",
        "queries read again at every step do not help",
        "no_better",
        ("timestep_queries", "static_queries"),
    ),
    Claim(
        "1",
        "it beats static queries with a larger DiT of the same FLOPs",
        "greater",
        ("repfusion", "static_queries_wide"),
    ),
    Claim(
        "1",
        "it beats TextEmbed with a larger DiT of the same FLOPs",
        "greater",
        ("repfusion", "text_embed_rae_wide"),
    ),
    Claim("2", "perception pretraining helps a frozen LLM", "greater", ("repfusion", "noisy_rae")),
    Claim("3", "a language-only LLM prefers to be tuned", "greater", ("noisy_rae_tuned", "noisy_rae")),
    Claim("3", "an MLLM prefers to stay frozen", "greater", ("repfusion", "tuned")),
    Claim(
        "3",
        "tuning helps a language-only LLM more than an MLLM",
        "flip",
        ("noisy_rae_tuned", "noisy_rae", "tuned", "repfusion"),
    ),
    Claim("4", "RAE beats VAE for a static text condition", "greater", ("text_embed_rae", "text_embed_vae")),
)


@dataclass(frozen=True)
class Assessment:
    """`adjusted` is p after Holm over all claims that are tests; None where there are too few seeds."""

    claim: Claim
    difference: Difference | None
    adjusted: float | None
    outcome: Literal["holds", "not shown", "reversed", "missing"]


def difference_of(claim: Claim, scores: Mapping[str, Seeds]) -> Difference | None:
    """None where a row is missing."""
    if any(row not in scores for row in claim.rows):
        return None
    if claim.kind != "flip":
        return compare(scores[claim.rows[0]], scores[claim.rows[1]])
    shared = sorted(set.intersection(*(set(scores[row]) for row in claim.rows)))
    a, b, c, d = (scores[row] for row in claim.rows)
    return of_differences([(a[s] - b[s]) - (c[s] - d[s]) for s in shared]) if shared else None


def assess(scores: Mapping[str, Seeds]) -> list[Assessment]:
    """`holds` needs p < 5% after Holm over the claims that can be tested, by the paired t test; `reversed`
    the same of the opposite. `no_better` holds where a 95% bound lies within MARGIN.
    """
    found = [difference_of(claim, scores) for claim in CLAIMS]
    tested = [d if claim.kind != "no_better" else None for claim, d in zip(CLAIMS, found, strict=True)]
    ahead = holm([d and d.p_paired for d in tested])
    behind = holm([None if d is None or d.p_paired is None else 1 - d.p_paired for d in tested])
    assessed = []
    for claim, difference, p, opposite in zip(CLAIMS, found, ahead, behind, strict=True):
        if difference is None:
            outcome = "missing"
        elif claim.kind == "no_better":
            is_within = difference.upper is not None and difference.upper < MARGIN
            outcome = "holds" if is_within else "not shown"
        elif p is not None and p < LEVEL:
            outcome = "holds"
        else:
            outcome = "reversed" if opposite is not None and opposite < LEVEL else "not shown"
        assessed.append(Assessment(claim, difference, p, outcome))
    return assessed


def disagreements(means: Mapping[str, float], least: float = 0.015) -> tuple[int, list[tuple[str, str]]]:
    """How many pairs of rows the paper tells apart by more than `least` and we scored both, and those that we
    order the other way: (above in the paper, above here).
    """
    known = [(ROWS[row].paper, row) for row in means if row in ROWS]
    rated = [(paper, row) for paper, row in known if paper is not None]
    pairs = [(a, b) for x, a in rated for y, b in rated if x - y > least]
    return len(pairs), [(a, b) for a, b in pairs if means[a] < means[b]]
