"""A sample and its seed -> a request and how much of it conditions."""

from pathlib import Path

import pytest
import torch
from tiny_columns import LONG, READERS, open_captioned, open_columns

from repfusion.data.dataset import ColumnDataset
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.data.recipe import Recipe, draw_caption
from repfusion.request import Branch, Request

COLUMNS = {PROMPT_FEATURES: READERS[PROMPT_FEATURES]}
SEEDS = range(400)


def drawn(dataset: ColumnDataset, dropout: float, index: int = 0) -> list[tuple[Request, Branch]]:
    return [Recipe(dropout).draw(dataset[index], seed, COLUMNS) for seed in SEEDS]


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, {"full"}), (0.3, {"full", "none"}), (1.0, {"none"})])
def test_as_many_conditions_are_dropped_as_the_recipe_says(columns: Path, dropout, expected):
    branches = [branch for _, branch in drawn(open_columns(columns), dropout)]
    assert set(branches) == expected
    assert branches.count("none") / len(SEEDS) == pytest.approx(dropout, abs=0.07)


def test_a_dropped_condition_keeps_its_caption(captioned: Path):
    """What the sample says of itself is the same whether it conditions or not: the caption loss reads it."""
    dataset = open_captioned(captioned, {"txt": 1.0, "long.txt": 1.0})
    prompts = [[request.prompt for request, _ in drawn(dataset, dropout)] for dropout in (0.0, 0.5, 1.0)]
    assert prompts[0] == prompts[1] == prompts[2]
    assert set(prompts[0]) == {LONG["000000"], *dataset[0].captions["txt"]}
    assert prompts[0] == [draw_caption(dataset[0].captions, dataset.weights, seed)[1] for seed in SEEDS]


def test_a_larger_share_drops_what_a_smaller_one_dropped(columns: Path):
    dataset = open_columns(columns)
    few, many = ([branch == "none" for _, branch in drawn(dataset, dropout)] for dropout in (0.1, 0.4))
    assert all(more for one, more in zip(few, many, strict=True) if one) and sum(many) > sum(few)


def test_columns_are_read_of_the_drawn_caption_and_only_where_it_conditions(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1.0, "long.txt": 1.0}, PROMPT_FEATURES)
    for request, branch in drawn(dataset, 0.3):
        if branch == "none":
            assert request.computed == {}
            continue
        name = "long.txt" if request.prompt == LONG["000000"] else "txt"
        stored = dataset[0].read(PROMPT_FEATURES, name)
        assert torch.equal(request.computed[PROMPT_FEATURES], torch.tensor(stored))


def test_a_column_that_the_data_set_lacks_is_left_out(columns: Path):
    request, _ = Recipe().draw(open_columns(columns)[0], 1, COLUMNS)
    assert request.computed == {}


def test_of_a_dropped_sample_no_column_is_read(captioned: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = open_captioned(captioned, {"txt": 1.0}, PROMPT_FEATURES)
    read: list[str] = []
    array = dataset.read_array
    monkeypatch.setattr(
        dataset, "read_array", lambda column, *rest: read.append(column) or array(column, *rest)
    )
    Recipe(1.0).draw(dataset[0], 1, COLUMNS)
    assert read == []
    Recipe(0.0).draw(dataset[0], 1, COLUMNS)
    assert read == [PROMPT_FEATURES]
