"""The results file: whole lines whoever appends, nothing twice, failures again."""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from pipelines.ladder.results import CheckpointScores, Result, append, finished, read
from pipelines.ladder.schedule import run_one_by_one
from pipelines.ladder.task import Task
from pipelines.ladder.worker import RECORD, run_task
from repfusion.data.config import DataConfig
from repfusion.evaluation.record import EvaluationConfig
from repfusion.train import TrainConfig


def result(row: str = "repfusion", seed: int = 0, score: float = 0.5, **changes) -> Result:
    point = CheckpointScores(
        step=10, headline="overall", values={"overall": score}, num_prompts=6, validation_loss=1.0
    )
    values = {"row": row, "seed": seed, "budget_name": "base", "budget": "b" * 64, "model": "m" * 64}
    return Result(**{**values, "time": "2026-11-21T00:00:00+00:00", "points": (point,), **changes})


def failed(**changes) -> Result:
    return result(status="failed", error="ValueError: no", points=(), **changes)


def test_what_is_appended_is_read_in_order(tmp_path: Path):
    path = tmp_path / "deep" / "results.jsonl"
    assert read(path, Result) == []
    lines = [result(seed=seed, score=seed / 10) for seed in range(3)]
    for line in lines:
        append(path, line)
    assert read(path, Result) == lines
    assert [one.score for one in lines] == [0.0, 0.1, 0.2]
    assert path.read_text().count("\n") == 3
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]


def _append_many(path: Path, row: str) -> None:
    for seed in range(20):
        append(path, result(row, seed))


def test_appends_beside_each_other_lose_nothing(tmp_path: Path):
    path, rows = tmp_path / "results.jsonl", ["a", "b", "c", "d"]
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_append_many, [path] * 4, rows))
    assert {(one.row, one.seed) for one in read(path, Result)} == {(r, s) for r in rows for s in range(20)}
    assert len(read(path, Result)) == 80


@pytest.mark.parametrize("line", ['{"row": "repfusion", "se', "{}", '{"row": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str):
    path = tmp_path / "results.jsonl"
    append(path, result())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: not a Result"):
        read(path, Result)


def test_only_what_ended_well_need_not_run_again():
    lines = [result(), failed(seed=1), result(seed=2, budget="c" * 64), failed(seed=3), result(seed=3)]
    assert finished(lines) == {lines[0].key, lines[2].key, lines[4].key}
    # another budget, other weights: another experiment
    assert result(budget="c" * 64).key != result().key != result(model="n" * 64).key


def task(folder: Path) -> Task:
    data = DataConfig(images=folder / "no", columns={"image_features": folder / "no"})
    return Task(
        row="repfusion",
        seed=0,
        budget_name="base",
        budget="b" * 64,
        model="m" * 64,
        settings={},
        weights={},
        train=TrainConfig(output_dir=folder, data=data),
        final=EvaluationConfig(),
        curve=EvaluationConfig(),
        num_validation=1,
        world={},
        wording="plain",
        ladders=(),
        prompt_tokens=10,
        directory=str(folder),
    )


def test_a_run_whose_driver_was_gone_when_it_ended_is_not_run_again(tmp_path: Path):
    done = result(score=0.25)
    (tmp_path / RECORD).write_text(json.dumps(done.model_dump(mode="json")))
    assert Result.model_validate_json(run_task(task(tmp_path))) == done


@pytest.mark.slow
def test_runs_one_by_one_answer_or_say_what_went_wrong(tmp_path: Path):
    done = result(score=0.25)
    (tmp_path / RECORD).write_text(json.dumps(done.model_dump(mode="json")))
    other = tmp_path / "other"
    other.mkdir()
    (first, found), (second, error) = run_one_by_one([task(tmp_path), task(other)])
    assert (first.train.output_dir, second.train.output_dir) == (tmp_path, other)
    assert isinstance(found, str) and Result.model_validate_json(found) == done
    assert isinstance(error, RuntimeError) and "ValueError" in str(error) and "no" in str(error)


def test_a_record_of_other_weights_is_not_taken_over(tmp_path: Path):
    (tmp_path / RECORD).write_text(json.dumps(result(model="n" * 64).model_dump(mode="json")))
    with pytest.raises(ValueError, match="no"):
        run_task(task(tmp_path))  # it trains, and there are no data
