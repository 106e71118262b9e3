"""Lines and table: what is kept apart, what is dropped, and the plan's six tests."""

import json
import logging

import pytest

from pipelines.ladder.results import append
from pipelines.ladder.science.charts import by_llm, shares, whether_it_can_show
from pipelines.ladder.science.results import FILE, RowResult, comparable, read_results
from pipelines.ladder.science.table import write_table
from repfusion.scenes.contrasts import DESCRIBED_KINDS

LEVELS = (0.3, 0.9)


def result(row: str, seed: int, overall: float, told: float = 1.0, **fields) -> RowResult:
    interval = {"low": overall - 0.1, "high": overall + 0.1}
    scores = {
        "values": {"overall": overall, "strict_position": 0.5, "task/position": 0.4},
        "counts": {},
        "intervals": {"overall": interval, "task/position": interval},
    }
    added = {kind: [0.2, 0.01] for kind in DESCRIBED_KINDS}
    accuracy = {kind: told for kind in DESCRIBED_KINDS}
    values = {
        "row": row,
        "seed": seed,
        "budget_name": "science",
        "budget": "plan",
        "model": "foundation",
        "time": "2026-11-26T00:00:00+00:00",
        "num_steps": 10,
        "scores": scores,
        "half": scores,
        "paired": {
            "0.300": {"right": 0.5, "wrong": {kind: [0.0, 0.01] for kind in DESCRIBED_KINDS}, "none": added},
            "0.900": {"right": 0.5, "wrong": added, "none": added},
        },
        "curve": ((5, 0.9), (10, 0.8)),
        "seconds": 2.0,
        "steps_per_sec": 5.0,
        "perception": {"train": accuracy, "by_noise_level": {"0.300": accuracy, "0.900": accuracy}},
        **fields,
    }
    return RowResult.model_validate(values)


def test_lines_of_other_plans_and_foundations_are_never_averaged(tmp_path):
    mine = [result("repfusion", seed, 0.8) for seed in (0, 1)]
    others = [result("repfusion", 2, 0.1, budget="other"), result("repfusion", 3, 0.1, model="other")]
    for one in (others[0], *mine, others[1]):
        append(tmp_path / FILE, one)
    found = comparable(read_results(tmp_path / FILE))
    assert [(one.seed, one.score) for one in found.rows["repfusion"]] == [(0, 0.8), (1, 0.8)]
    assert found.num_others == 2
    assert comparable([*mine, *others], "other").values("overall") == {"repfusion": {2: 0.1}}
    text = write_table(tmp_path).read_text()
    assert "| `repfusion` | llava | 2 | 0.800 ± 0.000 | 0.700 to 0.900 |" in text
    assert "left out, of another plan or foundation: 2" in text


def test_a_row_that_ran_again_counts_once():
    found = comparable([result("repfusion", 0, 0.1), result("repfusion", 0, 0.9)])
    assert found.values("overall") == {"repfusion": {0: 0.9}}


def test_a_line_that_was_cut_off_is_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / FILE
    append(path, result("repfusion", 0, 0.8))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert [one.seed for one in read_results(path)] == [0]
    assert "its last line was cut off and is dropped; that row runs again" in caplog.text
    append(path, result("repfusion", 1, 0.7))
    assert [one.seed for one in read_results(path)] == [0, 1]


def test_a_broken_line_elsewhere_is_an_error(tmp_path):
    path = tmp_path / FILE
    path.write_text("{\n" + result("repfusion", 0, 0.8).model_dump_json() + "\n")
    with pytest.raises(ValueError, match="line 1: not a RowResult"):
        read_results(path)
    path.write_text(json.dumps({"row": "repfusion"}) + "\n")
    with pytest.raises(ValueError, match="line 1: not a RowResult"):
        read_results(path)


def test_the_page_says_first_whether_the_claim_could_show(tmp_path):
    blind = {kind: 0.5 for kind in DESCRIBED_KINDS}
    seeing = {kind: 1.0 for kind in DESCRIBED_KINDS}
    perception = {"train": seeing, "by_noise_level": {"0.300": seeing, "0.900": blind}}
    one = result("repfusion", 0, 0.8, perception=perception)
    assert "**the claim cannot show**" in whether_it_can_show("llava", [one])
    assert "colour told up to 0.30, asked from 0.90" in whether_it_can_show("llava", [one])
    assert "there are levels" in whether_it_can_show("llava", [result("repfusion", 0, 0.8)])
    append(tmp_path / FILE, one)
    append(tmp_path / FILE, result("static_queries", 0, 0.7, status="failed", error="loss nan"))
    text = write_table(tmp_path).read_text()
    assert text.index("cannot show") < text.index("## Scores")
    assert "failed: `static_queries` seed 0: loss nan" in text
    assert (tmp_path / "llava.svg").read_text().startswith("<svg xmlns")
    assert text.count("| - | - | missing |") == 6


def test_a_charts_row_is_the_first_of_its_model():
    rows = {"repfusion": [result("repfusion", 0, 0.8)], "static_queries": [result("static_queries", 0, 0.1)]}
    found = by_llm(rows, {"repfusion": "llava", "static_queries": "llava"})
    assert [one.row for one in found["llava"]] == ["repfusion"]
    assert shares([(0.1, 1.0), (0.2, 4.0)]) == [(0.1, 0.25), (0.2, 1.0)] and shares([(0.1, -1.0)]) == []


def test_there_is_no_table_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_table(tmp_path)
