"""Intervals are the published ones, and hold the true share as often as they say."""

import numpy as np
import pytest

from repfusion.evaluation.suites.base import Count, Interval, Scores
from repfusion.evaluation.suites.intervals import mean_interval, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Stat. Med. 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilsons_interval_is_the_published_one(correct, total, low, high):
    found = wilson(Count(correct=correct, total=total))
    assert [found.low, found.high] == pytest.approx([low, high], abs=5e-5)


def test_the_mean_of_one_share_has_that_shares_interval():
    count = Count(correct=7, total=40)
    found, own = mean_interval([count]), wilson(count)
    assert [found.low, found.high] == pytest.approx([own.low, own.high])


@pytest.mark.parametrize("total", [10, 40])
@pytest.mark.parametrize(
    "shares", [(0.98, 0.9, 0.73, 0.8, 0.08, 0.38), (0.02,) * 6, (1.0,) * 5 + (0.5,), (0.99, 0.97, 0.9)]
)
def test_the_interval_of_a_mean_holds_the_true_one_as_often_as_it_says(shares, total):
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        found = mean_interval([Count(correct=int(rng.binomial(total, p)), total=total) for p in shares])
        held.append(found.low <= np.mean(shares) <= found.high)
    assert 0.93 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("correct", [0, 40])
def test_a_mean_has_a_width_where_none_or_all_are_right(correct):
    found = mean_interval([Count(correct=correct, total=40)] * 6)
    one = wilson(Count(correct=correct, total=40))
    assert 0.1 < (found.high - found.low) / (one.high - one.low) < 0.5
    assert correct / 40 in (found.low, found.high)


def test_what_was_not_counted_has_no_interval():
    with pytest.raises(ValueError, match="nothing was counted"):
        wilson(Count(correct=0, total=0))
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_an_interval_of_no_value_is_refused():
    with pytest.raises(ValueError, match="interval 'other' is none of the values overall"):
        Scores(headline="overall", values={"overall": 1}, intervals={"other": Interval(low=0, high=1)})
