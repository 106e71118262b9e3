"""Positions -> samples: exact shares, epochs without gaps, and nothing else that decides."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from repfusion.data.order import BLOCK, Occurrence, SampleOrder, sample_seed, shares_of

SIZES = {"main": 700, "photos": 53, "art": 11}
WEIGHTS = {"main": 1.0, "photos": 0.3, "art": 0.0321}


def make(seed: int = 3, sizes: dict[str, int] = SIZES, weights: dict[str, float] = WEIGHTS) -> SampleOrder:
    return SampleOrder(seed, sizes, {name: float(weight) for name, weight in weights.items()})


def test_every_data_set_has_its_share_to_less_than_a_sample_after_every_block():
    order, shares, counts = make(), shares_of(WEIGHTS), Counter()
    for block in range(12):
        places = [order.at(position) for position in range(block * BLOCK, (block + 1) * BLOCK)]
        here = Counter(place.dataset for place in places)
        counts.update(here)
        for name, share in shares.items():
            assert abs(counts[name] - share * (block + 1) * BLOCK) < 1
            assert abs(here[name] - share * BLOCK) < 2
        # shuffled: no stretch of the block is left to one of them
        for start in range(0, BLOCK, BLOCK // 4):
            part = Counter(place.dataset for place in places[start : start + BLOCK // 4])
            assert abs(part["photos"] - here["photos"] / 4) < 30


@pytest.mark.parametrize(
    "weights",
    [{"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 1023, "b": 1}, {"a": 5.5},
     {f"d{i}": 1 + i / 7 for i in range(40)}, {f"d{i}": 1 for i in range(1024)}],
)  # fmt: skip
def test_shares_hold_at_any_distance(weights: dict[str, float]):
    order = make(sizes=dict.fromkeys(weights, 10), weights=weights)
    for block in (1, 2, 999, 10**6, 10**12 + 1):
        before, after = order.turns_before(block), order.turns_before(block + 1)
        assert sum(before) == block * BLOCK
        for name, start, end in zip(order.names, before, after, strict=True):
            assert abs(start - order.shares[name] * block * BLOCK) < 1 and end >= start


def test_weights_are_the_decimals_that_were_written():
    assert shares_of({"a": 0.1, "b": 0.2}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}


def test_every_epoch_of_every_data_set_is_a_permutation_of_its_own():
    order, epochs = make(), {}
    for position in range(6 * BLOCK):
        place = order.at(position)
        epochs.setdefault((place.dataset, place.epoch), []).append(place.index)
    for name, size in SIZES.items():
        mine = [epochs[key] for key in sorted(epochs) if key[0] == name]
        assert len(mine) >= 2 and all(sorted(indices) == list(range(size)) for indices in mine[:-1])
        assert len(set(mine[-1])) == len(mine[-1])
        assert all(one != other for one, other in pairwise(mine))


def test_a_position_is_all_that_counts():
    forwards = {position: make().at(position) for position in range(0, 5000, 7)}
    fresh = make(sizes=dict(reversed(SIZES.items())), weights=dict(reversed(WEIGHTS.items())))
    assert {position: fresh.at(position) for position in reversed(forwards)} == forwards
    doubled = make(weights={name: 2 * weight for name, weight in WEIGHTS.items()})
    assert all(doubled.at(position) == place for position, place in forwards.items())
    assert sum(make(seed=4).at(position) == place for position, place in forwards.items()) < 50


def test_the_order_of_a_data_set_does_not_depend_on_those_beside_it():
    def walk(order: SampleOrder) -> list[Occurrence]:
        places = map(order.at, range(3 * BLOCK))
        return [place for place in places if place.dataset == "photos"][:150]

    alone = make(sizes={"photos": 53}, weights={"photos": 1.0})
    assert walk(make()) == walk(make(weights={**WEIGHTS, "photos": 2.0})) == walk(alone)


def test_the_order_is_that_of_earlier_trainings():
    """A checkpoint holds a position alone: what it reads next must not change with the code."""
    order = make()
    assert [order.at(position) for position in (0, 1023, 123456)] == [
        Occurrence("main", 0, 1),
        Occurrence("main", 1, 693),
        Occurrence("main", 132, 28),
    ]
    assert sample_seed(0, "main", 0, "000000") == 15361509874526431544


def test_seeds_of_samples_depend_on_each_part():
    parts = [(0, "main", 0, "1"), (1, "main", 0, "1"), (0, "photos", 0, "1"), (0, "main", 1, "1"),
             (0, "main", 0, "2"), (0, "main", 1, "11"), (0, "main", 11, "1")]  # fmt: skip
    seeds = {sample_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"main": 1023.5, "b": 1},
            r"data set 'b' has weight 1, less than 1/1024 of the sum 1024\.5; raise it",
        ),
        ({"main": 1, "b": 0}, r"'b' has weight 0\.0; expected a number above 0"),
        ({"main": -1, "b": 1}, "'main' has weight -1.0; expected"),
        ({"main": 1, "b": float("nan")}, "'b' has weight nan; expected"),
        ({"main": 1, "b": float("inf")}, "'b' has weight inf; expected"),
    ],
)
def test_weights_that_do_not_hold(weights: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        make(sizes=dict.fromkeys(weights, 3), weights=weights)


def test_an_empty_data_set_is_named():
    with pytest.raises(ValueError, match="data set 'art' holds no samples"):
        make(sizes={**SIZES, "art": 0})
