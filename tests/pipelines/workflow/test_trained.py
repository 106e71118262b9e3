"""How far a training is, at work and after; and what is said when it is stopped."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.commands import print_status, print_stopped, shown_by, to_open
from pipelines.config import WorkflowConfig
from pipelines.workflow.trained import how_far
from repfusion.locks import at_work
from repfusion.runs.folder import COMPLETE, RunFolder, checkpoint_folder


@pytest.fixture
def config(tmp_path) -> WorkflowConfig:
    """A workflow whose training has 600 steps; its first stages are not there."""
    return WorkflowConfig.model_validate(
        {"root": tmp_path / "run", "trainings": {"train": {"num_steps": 600}}}
    )


def save(config: WorkflowConfig, step: int) -> None:
    folder = checkpoint_folder(RunFolder(config.training("train").output_dir).checkpoints, step)
    folder.mkdir(parents=True)
    (folder / COMPLETE).write_text("{}")


def test_a_training_is_at_the_step_that_it_wrote_or_saved(config):
    training = config.training("train")
    assert how_far(training, is_at_work=True) is None
    save(config, 40)
    assert how_far(training, is_at_work=True) == "step 40/600, saved"
    RunFolder(training.output_dir).progress.write_text(json.dumps({"step": 42}))
    assert how_far(training, is_at_work=True) == "step 42/600"
    assert how_far(training, is_at_work=False) == "step 40/600, saved"
    RunFolder(training.output_dir).progress.write_text("{")  # half a file of another file system
    assert how_far(training, is_at_work=True) == "step 40/600, saved"


HOLDING = """
import sys, time
from pathlib import Path
from repfusion.locks import locked
with locked(Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_status_says_who_is_at_work_since_when(config, capsys):
    lock = config.root / ".lock"
    assert at_work(lock) == []
    command = [sys.executable, "-c", HOLDING, str(lock)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (holder,) = at_work(lock)
        assert holder.pid == other.pid
        print_status(config)
        other.communicate()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"at work: {holder}" and holder.since in said[0]
    assert at_work(lock) == []  # though its name still stands there
    print_status(config)
    assert "at work" not in capsys.readouterr().out


def test_who_stops_a_run_is_told_what_is_saved_and_how_to_go_on(config, capsys):
    save(config, 40)
    words = ["run", "my flow.yaml", "storage_options.token=hunter2"]
    print_stopped(config, words, signal.SIGINT)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "stopped by SIGINT; the finished shards are kept"
    assert said[1] == "train: step 40 of 600 is saved"
    assert said[2].startswith("go on: python -m pipelines run 'my flow.yaml'") and "hunter2" not in said[2]
    print_stopped(None, ["run", "w.yaml"], signal.SIGTERM)
    assert capsys.readouterr().err.splitlines()[-1] == "go on: python -m pipelines run w.yaml"


def test_the_last_lines_say_what_to_open(config, monkeypatch):
    config.root.mkdir(parents=True)
    (config.root / "report.html").touch()
    assert to_open(config) == [f"report.html  {config.root / 'report.html'}"]
    save(config, 40)
    assert to_open(config)[1] == f"tracked      make mlflow ROOT={config.root}"
    monkeypatch.chdir(config.root.parent)
    assert shown_by(Path("runs/demo"), "sqlite:///runs/mlflow.db") == "make mlflow"
    assert shown_by(config.root, "http://a:secret@tracking:5000").endswith("tracking:5000")
    assert "secret" not in shown_by(config.root, "http://a:secret@tracking:5000")
