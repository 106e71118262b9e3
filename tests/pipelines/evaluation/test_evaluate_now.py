"""Evaluations that somebody asks for: what may be named, which checkpoint is meant, where the scores go."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from evaluated_training import QUICK, EvaluatedTraining, evaluate_config
from slowly import all_but_one_slow

from pipelines.evaluate import Target, choose, evaluate_now, find_target
from pipelines.evaluation.records import finished, write_json
from pipelines.evaluation.schedule import EvaluationScheduler
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.columns import outputs_column
from repfusion.locks import take
from repfusion.runs.folder import step_of
from repfusion.tracking import metric_history, sqlite_uri

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


def as_found(training: EvaluatedTraining, uri: str | None) -> None:
    """The training's folder, and its workflow's root, as somebody might pass them on."""
    values = training.train.model_dump(mode="json")
    values["tracking"]["uri"] = uri
    write_json(training.folder / "config.json", values)
    root = training.folder.parent
    workflow = {"root": str(root), "trainings": {"train": {**values, "num_workers": 1}}, "evaluate": QUICK}
    (root / "config.yaml").write_text(yaml.safe_dump(workflow))


@pytest.mark.parametrize(
    "uri",
    [
        *("http://them.example/${oc.env:HOME}", "postgresql://me@them.example/db"),
        *(
            "sqlite:////tmp/their.db",
            "sqlite:///../../elsewhere/mlflow.db",
            "file:///tmp/their",
            "databricks",
        ),
    ],
)
def test_what_lies_in_a_folder_chooses_no_tracking_address(
    training: EvaluatedTraining, uri, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    as_found(training, uri)
    places = (training.folder, training.checkpoint(4), training.folder.parent)
    for place in places:
        assert find_target(place, RAY).train.tracking.uri is None
        assert "chooses no address; set MLFLOW_TRACKING_URI" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ours.example")
    for place in places:
        assert find_target(place, RAY).train.tracking.uri == "http://ours.example"
    given = find_target(places[-1], [*RAY, "trainings.train.tracking.uri=http://mine.example"])
    assert given.train.tracking.uri == "http://mine.example"
    if "${" not in uri:  # the file that is given is trusted
        assert find_target(places[-1] / "config.yaml", RAY).train.tracking.uri == uri


def test_the_database_beside_a_training_is_its_own(training: EvaluatedTraining, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = training.folder.parent
    for folder in (training.folder, root, root.parent):
        as_found(training, sqlite_uri(folder / "mlflow.db"))
        for place in (training.folder, training.checkpoint(4), root):
            assert find_target(place, RAY).train.tracking.uri == sqlite_uri(folder / "mlflow.db")
    as_found(training, None)
    assert find_target(training.folder, RAY).train.tracking.uri is None


@pytest.mark.parametrize(
    "place", all_but_one_slow([None, "s3://theirs/x", "file:///tmp/x", "../../x"], "../../x")
)
def test_nor_does_a_database_choose_where_files_go(tmp_path: Path, monkeypatch, place):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    training = EvaluatedTraining(tmp_path / "root", (2,))
    if place is not None:
        beside = (tmp_path / "root" / "mlartifacts").as_uri()
        with closing(sqlite3.connect(tmp_path / "root" / "mlflow.db")) as connection, connection:
            connection.execute(
                "UPDATE runs SET artifact_uri = ?", [f"{beside}/{place}" if place[0] == "." else place]
            )
    assert find_target(training.folder, RAY).train.tracking.uri == (training.uri if place is None else None)


def test_what_lies_in_a_folder_asks_nothing_of_the_environment(training: EvaluatedTraining, monkeypatch):
    monkeypatch.setenv("ZQ7", "secret")
    (training.folder / "evaluations").mkdir()
    values = {**QUICK, "device": "${oc.env:ZQ7}"}
    write_json(training.folder / "evaluations" / "config.json", values)
    assert find_target(training.folder, RAY).evaluate.device == "${oc.env:ZQ7}"
    as_found(training, None)
    path = training.folder.parent / "config.yaml"
    path.write_text(path.read_text().replace("num_steps: 6", "num_steps: ${oc.env:STEPS}"))
    with pytest.raises(ValueError, match=r"config\.yaml \(found in a folder, so it reads no environment\)"):
        find_target(training.folder.parent, RAY)


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


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_process_shares_an_evaluation_and_changes_no_score(tmp_path: Path):
    training = EvaluatedTraining(tmp_path, (2,), tracked=False)
    config = evaluate_config(num_processes=2, suites={"scenes": {"num_prompts": 240}})
    write_json(training.folder / "evaluations/config.json", config.model_dump(mode="json"))
    last = outputs_column(training.evaluation(2) / "scenes", 1).path.with_suffix(".lock")
    lock = take(last)  # the first process waits for it, until the second has looked
    assert lock is not None
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "evaluate",
        str(training.folder),
        "--step",
        "2",
        "--urgent",
        *RAY,
    ]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert driver.stdout is not None
    said = ""
    for line in driver.stdout:
        said += line
        if "another process drew and judged" in line:
            lock.close()
    assert driver.wait() == 0 and lock.closed, said
    found = finished(training.evaluation(2), config.scoring)
    alone = evaluate_checkpoint(training.checkpoint(2), tmp_path / "alone", config.scoring)
    assert found is not None and found.suites == alone.suites
