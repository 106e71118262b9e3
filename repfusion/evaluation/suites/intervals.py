"""Counts of right outputs -> 95% confidence intervals of their shares, over the draw of prompts and noise.

All are closed formulas, so the same counts give the same interval.
"""

import math
from collections.abc import Collection, Sequence

from repfusion.evaluation.suites.base import Count, Interval

Z_95 = 1.959963984540054
"""Normal quantile of 0.975."""


def wilson(count: Count) -> Interval:
    """Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927): unlike the share plus or minus its
    standard error, it stays in [0, 1] and has a width where none or all are right.

    Raises:
        ValueError: where nothing was counted.
    """
    if not count.total:
        raise ValueError("nothing was counted; expected a total of at least 1")
    return _wilson(count.correct / count.total, float(count.total))


def mean_interval(counts: Collection[Count]) -> Interval:
    """The interval of the mean over independent shares: Wilson's, of as many outputs as would give a single
    share the mean's variance. The variance is of shares smoothed by half an output to each side.

    In simulations of six shares over 10 or 40 outputs, from 0.02 to 1, it held the true mean in 94% to 97% of
    draws; the delta method did in 70% to 95%, since none or all right leave it without a width, as they do a
    bootstrap.

    Raises:
        ValueError: where there is no count, or a count of nothing.
    """
    if not counts or not all(count.total for count in counts):
        raise ValueError(f"{len(counts)} counts; expected at least one, each with a total of at least 1")
    smoothed = [(count.correct + 0.5) / (count.total + 1) for count in counts]
    variances = [s * (1 - s) / count.total for s, count in zip(smoothed, counts, strict=True)]
    middle = sum(smoothed) / len(counts)
    num_effective = middle * (1 - middle) / (sum(variances) / len(counts) ** 2)
    return _wilson(sum(count.correct / count.total for count in counts) / len(counts), num_effective)


def _wilson(share: float, total: float) -> Interval:
    spread = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    middle, scale = share + Z_95**2 / (2 * total), 1 + Z_95**2 / total
    # rounding may put a limit 1e-17 beyond a share of 0 or 1
    low, high = max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
    return Interval(low=min(share, low), high=max(share, high))


Stratum = tuple[float, Sequence[float]]
"""A weight, and scores of prompts."""


def prompts_interval(strata: Sequence[Stratum]) -> Interval:
    """The interval of a weighted sum of means over prompts of scores in [0, 1], which need not be 0 or 1:
    normal, of variances smoothed by half a prompt at either end, so that it has a width where all are alike.

    Raises:
        ValueError: where there is no stratum, or one without scores.
    """
    if not strata or not all(scores for _, scores in strata):
        raise ValueError(f"{len(strata)} groups of scores; expected at least one, each of one prompt or more")
    middle = math.fsum(weight * math.fsum(scores) / len(scores) for weight, scores in strata)
    variance = math.fsum(weight**2 * _smoothed_variance(scores) / len(scores) for weight, scores in strata)
    spread = Z_95 * math.sqrt(variance)
    return Interval(low=max(0.0, middle - spread), high=min(1.0, middle + spread))


def _smoothed_variance(scores: Sequence[float]) -> float:
    number = len(scores) + 1
    first = (math.fsum(scores) + 0.5) / number
    return max((math.fsum(score**2 for score in scores) + 0.5) / number - first**2, 0.0)
