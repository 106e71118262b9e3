"""Evaluations that somebody asks for: what may be named, which checkpoint is meant, where the scores go."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from evaluated_training import QUICK, EvaluatedTraining, evaluate_config

from pipelines.evaluate import Target, choose, evaluate_now, find_target
from pipelines.evaluation.records import finished, write_json
from pipelines.evaluation.schedule import EvaluationScheduler
from repfusion.runs.folder import step_of
from repfusion.tracking import metric_history

RAY = ["ray.num_cpus=1", "ray.object_store_mib=80"]


@pytest.fixture
def training(tmp_path: Path) -> EvaluatedTraining:
    return EvaluatedTraining(tmp_path / "root", (2, 4, 6), tracked=False)


def steps(target: Target, step: str) -> list[int]:
    return [step_of(path) for path in choose(target, step)]


def test_a_training_its_checkpoint_its_workflow_and_the_yaml_lead_to_the_same(training: EvaluatedTraining):
    root = training.folder.parent
    (training.folder / "evaluations").mkdir()
    config = evaluate_config(suites={"scenes": {"num_prompts": 12}})
    write_json(training.folder / "evaluations" / "config.json", config.model_dump(mode="json"))
    values = training.train.model_dump(mode="json")
    (root / "my.yaml").write_text(
        yaml.safe_dump(
            {"root": str(root), "trainings": {"train": {**values, "num_workers": 1}}, "evaluate": QUICK}
        )
    )

    for place in (training.folder, root, training.checkpoint(4)):
        target = find_target(place, ["evaluate.seed=3", *RAY])
        assert target.train == training.train
        assert target.evaluate == config.model_copy(update={"seed": 3})
        assert target.ray.num_cpus == 1
    assert steps(target, "latest") == [4]
    target = find_target(root / "my.yaml", ["evaluate.seed=3"])
    assert (target.train, target.evaluate) == (training.train, evaluate_config(seed=3))
    os.replace(root / "my.yaml", root / "config.yaml")
    assert find_target(root, ["evaluate.seed=3"]) == target


def test_a_training_that_was_moved_is_evaluated_where_it_is(training: EvaluatedTraining, tmp_path: Path):
    training.folder.rename(tmp_path / "moved")
    assert find_target(tmp_path / "moved").train.output_dir == tmp_path / "moved"


def test_what_is_nothing_of_these_is_said(training: EvaluatedTraining, tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither a workflow .* nor a training .* nor a checkpoint"):
        find_target(tmp_path)
    with pytest.raises(ValueError, match="no such config file"):
        find_target(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="num_promts"):
        find_target(training.folder, ["evaluate.suites.scenes.num_promts=3"])


def test_steps_by_number_and_by_name(training: EvaluatedTraining):
    target = find_target(training.folder)
    assert (steps(target, "latest"), steps(target, "all"), steps(target, "4")) == ([6], [2, 4, 6], [4])
    with pytest.raises(ValueError, match=r"step 5: expected latest, best, all or one of 2, 4, 6"):
        choose(target, "5")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints .* has scores yet"):
        choose(target, "best")
    with pytest.raises(ValueError, match="is one checkpoint"):
        choose(find_target(training.checkpoint(4)), "6")


@pytest.mark.ray
@pytest.mark.slow
def test_another_configuration_leaves_the_scheduled_scores_alone(ray_local, pool, tmp_path: Path, capsys):
    pool.close()
    training = EvaluatedTraining(tmp_path, (2,))
    config = evaluate_config()
    with EvaluationScheduler(config.model_copy(update={"beside_training": False}), training.train):
        pass
    evaluate_now(training.folder, "latest")
    assert "step 2: overall 0.000 (single_object 0.00" in capsys.readouterr().out
    (scheduled,) = metric_history(training.uri, training.run_id, "eval/overall")
    assert scheduled == (2, 0.0)
    assert [step_of(path) for path in choose(find_target(training.folder), "best")] == [2]

    evaluate_now(training.folder, "best", ["evaluate.suites.scenes.num_prompts=12"], is_urgent=True)
    assert finished(training.evaluation(2), config.scoring) is not None
    assert metric_history(training.uri, training.run_id, "eval/overall") == [scheduled]
    first, second = sorted(training.children(2), key=lambda run: run.info.start_time)
    assert {first.info.status, second.info.status} == {"FINISHED"}
    artifacts = {one.path for one in training.client.list_artifacts(second.info.run_id)}
    assert artifacts == {"gallery.png", "scores.json"}


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_killed_driver_left_is_done_by_the_next(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2, 4))
    training.hang(2)
    command = [sys.executable, "-m", "pipelines", "evaluate", str(training.folder), "--step"]
    simple = {name: value for name, value in QUICK.items() if not isinstance(value, dict)}
    settings = [f"evaluate.{name}={value}" for name, value in simple.items()]
    settings += ["evaluate.suites.scenes.num_prompts=6", "evaluate.sampler.num_steps=1"]
    settings += ["evaluate.max_concurrent=1", *RAY]
    driver = subprocess.Popen([*command, "all", *settings], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (training.evaluation(2) / "run.json").exists():
        assert time.monotonic() < end and driver.poll() is None
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert training.attempts(2) == ["running"]
    assert (training.checkpoint(2) / "pins" / "evaluate").exists()

    (training.checkpoint(2) / "complete.json").unlink()
    training.write_checkpoint(2)
    done = subprocess.run([*command, "all", *settings], capture_output=True, text=True, check=True)
    assert "step 2: overall" in done.stdout and "step 4: overall" in done.stdout
    assert (training.attempts(2), training.attempts(4)) == (["cut_short", "finished"], ["finished"])
    assert [run.info.status for run in training.children(2)] == ["KILLED", "FINISHED"]
    assert [step for step, _ in metric_history(training.uri, training.run_id, "eval/overall")] == [2, 4]
    again = subprocess.run([*command, "4", *settings], capture_output=True, text=True, check=True)
    assert json.loads((training.evaluation(4) / "attempts.json").read_text())["attempts"][-1]["number"] == 1
    assert "step 4: overall" in again.stdout
