"""Pins keep checkpoints from being pruned; records of attempts survive what may happen to them."""

import os
import time
from pathlib import Path

import pytest
from evaluated_training import EvaluatedTraining, evaluate_config

from pipelines.evaluation.records import (
    Record,
    best_checkpoint,
    finished,
    pin,
    pin_best,
    read_record,
    unpin,
    write_record,
)
from pipelines.evaluation.schedule import EvaluationScheduler
from repfusion.evaluation.record import Evaluation, SuiteResult
from repfusion.evaluation.suites.base import Scores
from repfusion.runs.checkpoint import prune
from repfusion.runs.folder import complete_checkpoints, step_of


@pytest.fixture
def training(tmp_path: Path) -> EvaluatedTraining:
    return EvaluatedTraining(tmp_path, (2, 4, 6, 8), tracked=False)


def left(training: EvaluatedTraining) -> list[int]:
    root = training.folder / "checkpoints"
    prune(root, keep_resume=1, keep_last=1)
    return [step_of(path) for path in complete_checkpoints(root)]


def score(training: EvaluatedTraining, step: int, overall: float, counting: float = 0.0) -> None:
    scores = Scores(headline="overall", values={"overall": overall, "task/counting": counting})
    config = evaluate_config().scoring
    result = SuiteResult(num_items=6, scores=scores, **config.versions()["scenes"])
    evaluation = Evaluation(checkpoint="", step=step, config=config, suites={"scenes": result}, seconds=0)
    training.evaluation(step).mkdir(parents=True)
    (training.evaluation(step) / "scores.json").write_text(evaluation.model_dump_json())


def test_a_pinned_checkpoint_and_the_best_one_stay(training: EvaluatedTraining):
    score(training, 2, 0.5)
    score(training, 6, 0.4)
    folder, config = training.folder / "evaluations", evaluate_config()
    found = complete_checkpoints(training.folder / "checkpoints")
    pin_best(found, folder, config, 8)
    assert pin(training.checkpoint(4))
    assert left(training) == [2, 4, 8]
    score(training, 8, 0.6)
    pin_best(complete_checkpoints(training.folder / "checkpoints"), folder, config, 8)
    unpin(training.checkpoint(4))
    assert left(training) == [8]
    assert not pin(training.checkpoint(4))  # gone, and not made again
    assert not training.checkpoint(4).exists()


def test_the_best_one_may_be_picked_by_another_value(
    training: EvaluatedTraining,
):
    score(training, 2, 0.5, counting=0.1)
    score(training, 6, 0.4, counting=0.2)
    folder, found = training.folder / "evaluations", complete_checkpoints(training.folder / "checkpoints")
    by_counting = evaluate_config(best_by="scenes/task/counting")
    assert best_checkpoint(found, folder, evaluate_config(), 8) == training.checkpoint(2)
    assert best_checkpoint(found, folder, by_counting, 8) == training.checkpoint(6)
    by_new_concept = evaluate_config(best_by="scenes/new_concept")
    assert best_checkpoint(found, folder, by_new_concept, 8) is None  # no item was about it
    with pytest.raises(
        ValueError, match=r"best_by 'scenes/speed' is no value of a suite; .*'scenes/overall'"
    ):
        evaluate_config(best_by="scenes/speed")


def test_scores_of_another_judge_or_rule_are_not_finished(training: EvaluatedTraining):
    score(training, 2, 0.5)
    folder, scoring = training.evaluation(2), evaluate_config().scoring
    assert finished(folder, scoring) is not None
    written = (folder / "scores.json").read_text()
    for name in ("judge", "rule"):
        present = scoring.versions()["scenes"][name]
        (folder / "scores.json").write_text(written.replace(f'"{present}"', '"an earlier one"'))
        assert finished(folder, scoring) is None


def test_a_pin_in_use_is_renewed_and_a_forgotten_one_lapses(training: EvaluatedTraining):
    for step in (2, 4):
        pin(training.checkpoint(step))
        old = time.time() - 25 * 3600
        os.utime(training.checkpoint(step) / "pins" / "evaluate", (old, old))
    pin(training.checkpoint(4))
    assert left(training) == [4, 8]


def test_a_clock_that_is_a_day_off_keeps_no_pin_and_loses_none(training: EvaluatedTraining, monkeypatch):
    """The machine that pins and the one that prunes may have different clocks, and set them back."""
    real, day = time.time, 25 * 3600
    for step, skew in ((2, -day), (4, day)):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(time, "time", lambda skew=skew: real() + skew)
            assert pin(training.checkpoint(step))
            pin(training.checkpoint(step))
    for skew in (-day, 0, day):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(time, "time", lambda skew=skew: real() + skew)
            assert left(training) == [2, 4, 8]
    path = training.checkpoint(2) / "pins" / "evaluate"
    os.utime(path, (real() + 30 * day, real() + 30 * day))
    assert left(training) == [2, 4, 8]
    assert abs(path.stat().st_mtime - real()) < 60  # from now on it is as old as any other
    os.utime(path, (real() - day, real() - day))
    assert left(training) == [4, 8]


def test_a_failure_dated_in_the_future_puts_nothing_off(training: EvaluatedTraining, monkeypatch):
    config = evaluate_config(backoff_sec=600.0)
    scheduler = EvaluationScheduler(config, training.train)
    checkpoint, folder = training.checkpoint(2), training.evaluation(2)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 25 * 3600)
    write_record(folder, read_record(folder, config.scoring).begin().end("failed", "ValueError: no"))
    assert not scheduler._is_due(checkpoint)
    monkeypatch.undo()
    assert scheduler._is_due(checkpoint)


def test_the_pace_by_the_clock_is_kept_by_what_is_past(training: EvaluatedTraining, monkeypatch):
    config = evaluate_config(every_minutes=60.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 25 * 3600)
    record = read_record(training.evaluation(2), config.scoring).begin().end("finished")
    write_record(training.evaluation(2), record)
    scheduler = EvaluationScheduler(config, training.train)
    assert scheduler._clock() == []
    monkeypatch.undo()  # set back: what began an hour ago is dated tomorrow
    assert EvaluationScheduler(config, training.train)._clock() == [training.checkpoint(8)]
    # and one that waits for its time does not wait for the clock to come back to where it was
    monkeypatch.setattr(time, "monotonic", lambda start=time.monotonic(): start + 3600.5)
    assert scheduler._clock() == [training.checkpoint(8)]


def test_attempts_are_those_with_the_same_configuration(tmp_path: Path):
    config = evaluate_config().scoring
    failed = read_record(tmp_path, config).begin().end("failed", "ValueError: no").begin().end("failed")
    write_record(tmp_path, failed)
    assert read_record(tmp_path, config) == failed and failed.num_failed == 2
    assert failed.due_at(10.0) == pytest.approx(time.time() + 20, abs=5)  # the second wait is twice as long
    assert read_record(tmp_path, evaluate_config(seed=1).scoring).attempts == ()
    (tmp_path / "attempts.json").write_text("{")
    assert read_record(tmp_path, config) == Record(config=failed.config)
