"""Evaluations on a real local Ray and MLflow: by steps and by the clock, after failures, hangs, kills."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from evaluated_training import EvaluatedTraining, evaluate_config
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.records import hold
from pipelines.evaluation.schedule import EvaluationScheduler
from pipelines.runtime.session import StageError
from repfusion.runs.folder import step_of
from repfusion.tracking import metric_history

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def cpus(ray_local, pool):
    pool.close()  # its idle actors hold the CPUs


def wait_for(what: Callable[[], object], limit_sec: float = 60.0) -> None:
    end = time.monotonic() + limit_sec
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def evaluators() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Eval")]


@pytest.mark.slow
def test_scores_land_in_the_training_s_run(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2, 4, 6))
    found = EvaluationScheduler(evaluate_config(every_steps=4), training.train).finish()
    assert [step_of(folder) for folder, _ in found] == [4, 6]
    scores = [(step_of(folder), one.suites["scenes"].scores.values["overall"]) for folder, one in found]
    assert metric_history(training.uri, training.run_id, "eval/overall") == scores
    for step in (4, 6):
        (child,) = training.children(step)
        assert (child.info.status, child.data.metrics["eval/overall"]) == ("FINISHED", 0.0)
        assert training.attempts(step) == ["finished"]
        assert not (training.checkpoint(step) / "pins" / "evaluate").exists()
    assert training.attempts(2) == []
    experiment = training.client.get_run(training.run_id).info.experiment_id
    models = training.client.search_logged_models([experiment])
    scored = {
        model.tags["step"]: [one.value for one in model.metrics or [] if one.key == "eval/overall"]
        for model in models
    }
    assert scored == {"2": [], "4": [0.0], "6": [0.0]}
    assert training.client.get_model_version_by_alias("repfusion", "best").tags["step"] == "4"
    assert (training.checkpoint(4) / "pins" / "best").exists() and not (
        training.checkpoint(6) / "pins"
    ).exists()


@pytest.mark.slow
def test_a_rare_suite_is_scored_in_its_turn_and_again_when_all_are_asked_for(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2, 4, 6), num_steps=6)
    suites = {"scenes": {"num_prompts": 6}, "other": {"kind": "scenes", "num_prompts": 12}}
    config = evaluate_config(suites=suites, suite_every_steps={"other": 4})
    found = EvaluationScheduler(config, training.train).finish()
    assert [list(one.suites) for _, one in found] == [["scenes"], ["scenes", "other"], ["scenes", "other"]]
    steps = [step for step, _ in metric_history(training.uri, training.run_id, "eval/other/overall")]
    assert steps == [4, 6]
    again = EvaluationScheduler(evaluate_config(suites=suites), training.train).finish()
    assert [list(one.suites) for _, one in again] == [["scenes", "other"]] * 3


@pytest.mark.slow
def test_beside_a_training_old_and_new_checkpoints_are_caught_up_in_idle_time(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,), tracked=False)
    training.hang(2)
    with EvaluationScheduler(evaluate_config(), training.train):
        wait_for(lambda: threads_of_evaluators().get("SCHED_IDLE"))
        assert (training.checkpoint(2) / "pins" / "evaluate").exists()
        assert len(evaluators()) == 1
        shutil.rmtree(training.checkpoint(2))
        training.write_checkpoint(2)
        evaluators()[0].kill()
        training.write_checkpoint(4)
        wait_for(lambda: training.attempts(4) == ["finished"])
    assert training.attempts(2) == ["failed", "finished"]


def threads_of_evaluators() -> dict[str, int]:
    """How many threads are scheduled how."""
    names = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_IDLE: "SCHED_IDLE"}
    found: dict[str, int] = {}
    for process in evaluators():
        for thread in process.threads():
            name = names[os.sched_getscheduler(thread.id)]
            found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.slow
def test_by_the_clock_the_newest_without_scores_is_next(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2, 4), tracked=False)
    config = evaluate_config(every_minutes=0.3)
    with EvaluationScheduler(config, training.train):
        wait_for(lambda: training.attempts(4) == ["finished"])
        training.write_checkpoint(5)
        wait_for(lambda: training.attempts(5) == ["finished"])
    begun = [attempts(training, step)[0]["started_at"] for step in (4, 5)]
    assert begun[1] - begun[0] >= 60 * 0.3
    # on a busy machine the next one's turn may have come
    later = attempts(training, 2) if training.attempts(2) else []
    assert all(one["started_at"] - begun[1] >= 60 * 0.3 for one in later)
    hourly = config.model_copy(update={"every_minutes": 60.0})
    with EvaluationScheduler(hourly, training.train):  # another driver keeps the pace
        training.write_checkpoint(6)
        time.sleep(3)
    assert training.attempts(6) == []
    found = EvaluationScheduler(hourly, training.train).finish()
    assert [step for folder, _ in found if (step := step_of(folder)) != 2] == [4, 5, 6]


def attempts(training: EvaluatedTraining, step: int) -> list[dict]:
    return json.loads((training.evaluation(step) / "attempts.json").read_text())["attempts"]


@pytest.mark.slow
def test_a_failed_evaluation_is_retried_and_both_attempts_are_in_mlflow(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,))
    weights = training.damage(2)
    with EvaluationScheduler(evaluate_config(), training.train):
        wait_for(lambda: training.attempts(2)[:1] == ["failed"])
        training.repair(2, weights)
        wait_for(lambda: training.attempts(2)[-1:] == ["finished"])
    *failed, last = training.children(2)
    assert {run.info.status for run in failed} == {"FAILED"} and last.info.status == "FINISHED"
    assert "ema.safetensors" in failed[0].data.tags["error"]
    assert "in evaluate_checkpoint" in training.traceback(failed[0])
    assert len(metric_history(training.uri, training.run_id, "eval/overall")) == 1


@pytest.mark.slow
def test_what_fails_for_good_is_seen_and_leaves_the_others_complete(tmp_path: Path, capsys):
    training = EvaluatedTraining(tmp_path, (2, 4))
    training.damage(2)
    scheduler = EvaluationScheduler(evaluate_config(max_attempts=2), training.train)
    with pytest.raises(StageError, match=r"1 of 2 evaluations failed: step_00000002: ValueError: .*ema"):
        scheduler.finish()
    assert (training.attempts(2), training.attempts(4)) == (["failed"] * 2, ["finished"])
    assert [run.info.status for run in training.children(2)] == ["FAILED"] * 2
    assert all("ValueError" in training.traceback(run) for run in training.children(2))
    assert "step 2: attempt 1 failed: ValueError" in capsys.readouterr().out
    assert not (training.checkpoint(2) / "pins").exists()
    with EvaluationScheduler(evaluate_config(max_attempts=2), training.train):
        time.sleep(3)
    assert training.attempts(2) == ["failed"] * 2  # another driver beside the training leaves it
    with pytest.raises(StageError):
        EvaluationScheduler(evaluate_config(max_attempts=2), training.train).finish()
    assert training.attempts(2) == ["failed"] * 3  # whoever runs the stage again has one attempt more


@pytest.mark.slow
def test_one_that_hangs_is_stopped_at_its_deadline(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,))
    training.hang(2)
    scheduler = EvaluationScheduler(evaluate_config(max_attempts=1, deadline_sec=10.0), training.train)
    with pytest.raises(StageError, match="step_00000002: took longer than deadline_sec 10"):
        scheduler.finish()
    (run,) = training.children(2)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "took longer than deadline_sec 10")
    wait_for(lambda: not evaluators(), 5.0)


@pytest.mark.slow
def test_one_whose_process_is_killed_is_tried_again(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,))
    training.hang(2)
    with EvaluationScheduler(evaluate_config(), training.train):
        wait_for(lambda: (training.evaluation(2) / "run.json").exists())
        shutil.rmtree(training.checkpoint(2))
        training.write_checkpoint(2)
        os.kill(evaluators()[0].pid, signal.SIGKILL)
        wait_for(lambda: training.attempts(2) == ["failed", "finished"])
    failed, _ = training.children(2)
    assert failed.info.status == "FAILED" and "its process died" in failed.data.tags["error"]


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_is_missed_and_said(tmp_path: Path, capsys):
    training = EvaluatedTraining(tmp_path, (2, 4, 6))
    shutil.rmtree(training.checkpoint(2))
    scheduler = EvaluationScheduler(evaluate_config(), training.train)
    assert [step_of(folder) for folder, _ in scheduler.finish()] == [4, 6]
    assert scheduler.missed == {2}
    assert "step 2: missed" in capsys.readouterr().out
    assert training.client.get_run(training.run_id).data.tags["evaluate.missed_steps"] == "2"
    shutil.rmtree(training.checkpoint(4))
    again = EvaluationScheduler(evaluate_config(), training.train)
    assert [step_of(folder) for folder, _ in again.finish()] == [4, 6]  # its scores stay when it is pruned
    assert "missed" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_fails_takes_its_evaluations_along(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,), tracked=False)
    training.hang(2)
    scheduler = EvaluationScheduler(evaluate_config(), training.train)
    with pytest.raises(RuntimeError, match="a rank failed"), scheduler:
        wait_for(evaluators)
        raise RuntimeError("a rank failed")
    wait_for(lambda: not evaluators(), 5.0)
    shutil.rmtree(training.checkpoint(2))
    training.write_checkpoint(2)
    EvaluationScheduler(evaluate_config(max_attempts=1), training.train).finish()
    assert training.attempts(2) == ["cut_short", "finished"]  # it was no failure of the evaluation


@pytest.mark.slow
def test_what_is_at_work_elsewhere_is_waited_for(tmp_path: Path, capsys):
    training = EvaluatedTraining(tmp_path, (2,), tracked=False)
    lock = hold(training.evaluation(2))
    assert lock is not None and hold(training.evaluation(2)) is None
    with ThreadPoolExecutor() as thread:
        found = thread.submit(EvaluationScheduler(evaluate_config(), training.train).finish)
        time.sleep(3)
        assert training.attempts(2) == [] and not evaluators()
        assert capsys.readouterr().out == "evaluate: step_00000002: another process is at it; waiting\n"
        lock.close()
        assert len(found.result(60)) == 1


@pytest.mark.slow
def test_one_that_reserves_cpus_starts_once_they_are_free(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,), tracked=False)
    ranks = placement_group([{"CPU": 2}])  # as Ray Train's
    assert ranks.wait(30)
    with EvaluationScheduler(evaluate_config(num_cpus=1, memory_mib=100), training.train):
        time.sleep(3)
        assert (
            training.attempts(2) == [] and not evaluators()
        )  # not even in Ray's queue, before restarted ranks
        remove_placement_group(ranks)
        wait_for(evaluators)
        assert ray.available_resources()["CPU"] == 1
    assert training.attempts(2) == ["finished"]


def test_two_schedules_at_once_are_refused():
    with pytest.raises(ValueError, match="two schedules"):
        EvaluateConfig(every_steps=1, every_minutes=1)
