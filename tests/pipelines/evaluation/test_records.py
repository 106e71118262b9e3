"""Pins keep checkpoints from being pruned; records of attempts survive what may happen to them."""

import os
import time
from pathlib import Path

import pytest
from evaluated_training import EvaluatedTraining, evaluate_config

from pipelines.evaluation.records import Record, pin, pin_best, read_record, unpin, write_record
from repfusion.evaluation import Evaluation, Scores
from repfusion.runs.checkpoint import complete_checkpoints, prune, step_of


@pytest.fixture
def training(tmp_path: Path) -> EvaluatedTraining:
    return EvaluatedTraining(tmp_path, (2, 4, 6, 8), tracked=False)


def left(training: EvaluatedTraining) -> list[int]:
    root = training.folder / "checkpoints"
    prune(root, keep_resume=1, keep_last=1)
    return [step_of(path) for path in complete_checkpoints(root)]


def score(training: EvaluatedTraining, step: int, overall: float) -> None:
    scores = Scores(
        overall=overall, per_task={}, new_concept=None, shuffled_overall=0, num_prompts=0, counts={}
    )
    evaluation = Evaluation(
        checkpoint="", step=step, config=evaluate_config().scoring, scores=scores, seconds=0, samples=[]
    )
    training.evaluation(step).mkdir(parents=True)
    (training.evaluation(step) / "scores.json").write_text(evaluation.model_dump_json())


def test_a_pinned_checkpoint_and_the_best_one_stay(training: EvaluatedTraining):
    score(training, 2, 0.5)
    score(training, 6, 0.4)
    folder, scoring = training.folder / "evaluations", evaluate_config().scoring
    found = complete_checkpoints(training.folder / "checkpoints")
    pin_best(found, folder, scoring)
    assert pin(training.checkpoint(4))
    assert left(training) == [2, 4, 8]
    score(training, 8, 0.6)
    pin_best(complete_checkpoints(training.folder / "checkpoints"), folder, scoring)
    unpin(training.checkpoint(4))
    assert left(training) == [8]
    assert not pin(training.checkpoint(4))  # gone, and not made again
    assert not training.checkpoint(4).exists()


def test_a_pin_in_use_is_renewed_and_a_forgotten_one_lapses(training: EvaluatedTraining):
    for step in (2, 4):
        pin(training.checkpoint(step))
        old = time.time() - 25 * 3600
        os.utime(training.checkpoint(step) / "pins" / "evaluate", (old, old))
    pin(training.checkpoint(4))
    assert left(training) == [4, 8]


def test_attempts_are_those_with_the_same_configuration(tmp_path: Path):
    config = evaluate_config().scoring
    failed = read_record(tmp_path, config).begin().end("failed", "ValueError: no").begin().end("failed")
    write_record(tmp_path, failed)
    assert read_record(tmp_path, config) == failed and failed.num_failed == 2
    assert failed.due_at(10.0) == pytest.approx(time.time() + 20, abs=5)  # the second wait is twice as long
    assert read_record(tmp_path, evaluate_config(seed=1).scoring).attempts == ()
    (tmp_path / "attempts.json").write_text("{")
    assert read_record(tmp_path, config) == Record(config=failed.config)
