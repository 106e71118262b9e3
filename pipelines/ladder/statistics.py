"""Scores by seed -> means, differences and what few seeds can and cannot show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from scipy import stats

Seeds = Mapping[int, float]
"""A score by seed."""
MAX_EXACT = 200_000
"""Rearrangements that an exact test goes through at most."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None of a single value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


@dataclass(frozen=True)
class Difference:
    """How much the first scores above the second. p are one-sided, of so large a difference if there
    were none.

    Runs of one seed share order of samples, captions, noise levels and prompts, so they are compared in
    pairs; `p_welch` compares them as if they were independent.
    """

    num_pairs: int
    mean: float
    error: float | None
    """Standard error; None with fewer than two seeds."""
    upper: float | None
    """One-sided 95% bound from above."""
    p_paired: float | None
    """Student's t of the differences."""
    p_welch: float | None
    p_exact: float | None
    """Share of all changes of sign of the differences whose mean is as large; with n pairs at least 2^-n."""
    p_labels: float | None
    """Share of all ways to deal out the scores to the two rows with as large a difference; assumes that they
    are exchangeable, not that they are normal.
    """


def compare(first: Seeds, second: Seeds) -> Difference | None:
    """Difference in pairs over the seeds that both have; None where they share none."""
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    ours, others = [first[seed] for seed in shared], [second[seed] for seed in shared]
    return of_differences([a - b for a, b in zip(ours, others, strict=True)], ours, others)


def of_differences(
    differences: Sequence[float], ours: Sequence[float] = (), others: Sequence[float] = ()
) -> Difference:
    """Mean and tests of paired differences; `ours` and `others` for the tests that ignore the pairs."""
    n = len(differences)
    mean, error = mean_and_error(differences)
    p_paired = p_welch = upper = None
    if n > 1 and error:
        p_paired = float(stats.t.sf(mean / error, n - 1))
        upper = mean + float(stats.t.ppf(0.95, n - 1)) * error
    if len(ours) > 1 and (np.var(ours) > 0 or np.var(others) > 0):
        p_welch = float(stats.ttest_ind(ours, others, equal_var=False, alternative="greater").pvalue)
    return Difference(
        n, mean, error, upper, p_paired, p_welch, sign_flips(differences), relabellings(ours, others)
    )


def sign_flips(differences: Sequence[float]) -> float | None:
    """Exact one-sided sign-flip test; None for too few or too many."""
    n = len(differences)
    if n < 2 or 2**n > MAX_EXACT:
        return None
    observed = sum(differences)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=n)
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def relabellings(ours: Sequence[float], others: Sequence[float]) -> float | None:
    """Exact one-sided permutation test of two independent groups; None for too few or too many."""
    n, values = len(ours), [*ours, *others]
    if n < 2 or len(others) < 2 or math.comb(len(values), n) > MAX_EXACT:
        return None
    observed = sum(ours)
    sums = [sum(values[i] for i in chosen) for chosen in combinations(range(len(values)), n)]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p adjusted for that many tests (Holm 1979); None stay and do not count."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (ps[i] or 0.0)))
        adjusted[i] = largest
    return adjusted
