"""Means, differences and tests of few seeds, against scipy and values by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from pipelines.ladder.claims import assess, disagreements
from pipelines.ladder.plans.repfusion import CLAIMS, DESCRIBED, REPFUSION
from pipelines.ladder.statistics import compare, holm, mean_and_error, relabellings, sign_flips

A = {0: 0.62, 1: 0.66, 2: 0.61, 3: 0.70}
B = {0: 0.55, 1: 0.60, 2: 0.58, 3: 0.61}


def test_mean_and_standard_error_by_hand():
    assert mean_and_error([0.5, 0.6, 0.7]) == pytest.approx((0.6, 0.1 / math.sqrt(3)))
    assert mean_and_error([0.5]) == (0.5, None)


def test_a_difference_agrees_with_scipy():
    found = compare(A, B)
    assert found is not None and found.num_pairs == 4
    ours, others = list(A.values()), list(B.values())
    paired = stats.ttest_rel(ours, others, alternative="greater")
    assert found.mean == pytest.approx(0.0625)
    assert found.p_paired == pytest.approx(paired.pvalue)
    assert found.upper == pytest.approx(found.mean + stats.t.ppf(0.95, 3) * found.error)
    welch = stats.ttest_ind(ours, others, equal_var=False, alternative="greater")
    assert found.p_welch == pytest.approx(welch.pvalue)

    def gap(x, y, axis):
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    for kind, own in (("samples", found.p_exact), ("independent", found.p_labels)):
        exact = stats.permutation_test(
            (ours, others), gap, permutation_type=kind, alternative="greater", n_resamples=np.inf
        )
        assert own == pytest.approx(exact.pvalue), kind


def test_three_seeds_cannot_show_more_than_they_can():
    assert sign_flips([0.1, 0.2, 0.3]) == 1 / 8
    assert relabellings([0.7, 0.8, 0.9], [0.1, 0.2, 0.3]) == 1 / 20
    assert sign_flips([0.1, -0.2, 0.3]) == 3 / 8  # sums >= 0.2: +++, +-+, -++ leaves 0.4
    assert sign_flips([0.0, 0.0]) == 1.0


def test_only_shared_seeds_are_paired_and_one_seed_has_no_p():
    found = compare({0: 0.6, 1: 0.9}, {0: 0.5, 2: 0.1})
    assert found is not None
    assert (found.num_pairs, found.error, found.p_paired, found.p_welch) == (1, None, None, None)
    assert found.p_exact is None and found.mean == pytest.approx(0.1)
    assert compare({0: 0.6}, {1: 0.5}) is None
    same = compare({0: 0.6, 1: 0.7}, {0: 0.5, 1: 0.6})
    assert same is not None and same.mean == pytest.approx(0.1)


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def scores(**means: float) -> dict[str, dict[int, float]]:
    """Eight seeds, the same scatter of 0.01 in a different order for each row."""
    scatter, order = 0.01 * np.linspace(-1, 1, 8), list(REPFUSION.rows)
    shuffled = {row: np.random.default_rng(order.index(row)).permutation(scatter) for row in means}
    return {row: dict(enumerate(mean + shuffled[row])) for row, mean in means.items()}


PAPER = scores(
    repfusion=0.70,
    static_queries=0.55,
    timestep_queries=0.54,
    repfusion_noise_taught=0.80,
    static_queries_noise_taught=0.55,
    repfusion_language=0.62,
)
"""Scores that bear out every claim."""
NAMED = {
    "reads": ("repfusion", "static_queries"),
    "reads, noise-taught": ("repfusion_noise_taught", "static_queries_noise_taught"),
    "adds": ("repfusion_noise_taught", "static_queries_noise_taught", "repfusion", "static_queries"),
    "perceives": ("repfusion", "repfusion_language"),
    "perceives noise": ("repfusion_noise_taught", "repfusion"),
    "read again": ("timestep_queries", "static_queries"),
}
"""Claims by what they compare."""


def test_scores_can_bear_out_every_claim():
    assert {one.outcome for one in assess(REPFUSION, PAPER)} == {"holds"}
    assert [claim.rows for claim in CLAIMS] == list(NAMED.values())


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"repfusion": 0.50}, {"reads": "reversed", "perceives": "reversed", "adds": "holds"}),
        ({"timestep_queries": 0.60}, {"read again": "reversed"}),
        ({"timestep_queries": 0.579}, {"read again": "not shown"}),
        ({"repfusion_language": 0.70}, {"perceives": "not shown"}),
        ({"repfusion_noise_taught": 0.60}, {"adds": "reversed", "perceives noise": "reversed"}),
    ],
)
def test_what_is_otherwise_is_said(changed: dict[str, float], expected: dict[str, str]):
    outcomes = {one.claim.rows: one.outcome for one in assess(REPFUSION, PAPER | scores(**changed))}
    assert {name: outcomes[NAMED[name]] for name in expected} == expected


def test_a_missing_row_leaves_its_claims_open_and_the_others_their_correction():
    without = {row: own for row, own in PAPER.items() if row != "repfusion_noise_taught"}
    missing = {one.claim.rows for one in assess(REPFUSION, without) if one.outcome == "missing"}
    assert missing == {NAMED["reads, noise-taught"], NAMED["adds"], NAMED["perceives noise"]}
    assert {row for claim in (*CLAIMS, *DESCRIBED) for row in claim.rows} <= set(REPFUSION.rows)


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_six_tests_pair_by_seed():
    scores = {
        "repfusion": seeds(0.80, 0.82, 0.81),
        "static_queries": seeds(0.79, 0.80, 0.80),
        "repfusion_noise_taught": seeds(0.95, 0.96, 0.94),
        "static_queries_noise_taught": seeds(0.80, 0.80, 0.79),
        "timestep_queries": seeds(0.80, 0.80, 0.80, 0.99),
    }
    found = assess(REPFUSION, scores)
    assert [one.difference and round(one.difference.mean, 4) for one in found] == [
        *(0.0133, 0.1533, 0.14, None, 0.14, 0.0033)
    ]
    assert found[3].p is None and found[3].adjusted is None
    assert found[1].p is not None and found[1].adjusted is not None
    assert found[1].p < 0.001 < 0.01 > found[1].adjusted >= found[1].p
    assert found[5].claim.margin == 0.03 and found[5].p is not None and found[5].p < 0.02
    assert found[5].difference is not None and found[5].difference.num_pairs == 3
    reversed_scores = {**scores, "timestep_queries": seeds(0.89, 0.90, 0.91)}
    p = assess(REPFUSION, reversed_scores)[5].p
    assert p is not None and p > 0.95


def test_one_seed_is_no_test():
    found = assess(REPFUSION, {"repfusion": seeds(0.9), "static_queries": seeds(0.1)})
    assert found[0].difference is not None and found[0].p is None and len(found) == len(CLAIMS) == 6


def test_the_papers_order_is_compared_pair_by_pair():
    means = {"repfusion": 0.5, "static_queries": 0.6, "timestep_queries": 0.4, "text_embed_language": 0.9}
    # 0.70 > 0.55 and 0.54 by enough to count, 0.55 > 0.54 not; text_embed_language has no figure
    assert disagreements(REPFUSION, means) == (2, [("repfusion", "static_queries")])
    assert disagreements(REPFUSION, {"repfusion_language": 0.5}) == (0, [])
