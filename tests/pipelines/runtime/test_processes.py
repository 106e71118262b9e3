"""Driver, actors, Ray's own processes and the scenes' server are gone after every run, however it ended."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import (
    actors_of,
    listening_sockets,
    run_command,
    stage_at_work,
    still_listening,
    tagged,
    tagged_process,
    temporaries,
    wait_until_gone,
)
from running import until
from safetensors.torch import load_file, save_file

from pipelines.config import WorkflowConfig
from repfusion.config import to_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LIMIT_SEC = 300


@pytest.fixture
def write(tmp_path: Path) -> Callable[[WorkflowConfig], Path]:
    def write(config: WorkflowConfig) -> Path:
        path = tmp_path / "workflow.yaml"
        path.write_text(to_yaml(config))
        return path

    return write


def tag_of(folder: Path) -> str:
    return f"{os.getpid()}-{folder.name}"


def run_to_the_end(config: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of an undisturbed run, of which nothing may be left."""
    log = folder / "log"
    sockets: set[str] = set()
    with tagged_process(run_command(config), tag_of(folder), log) as process:
        start = time.monotonic()
        while process.poll() is None:
            sockets |= listening_sockets(list(tagged(tag_of(folder))))
            assert time.monotonic() - start < LIMIT_SEC, log.read_text()
            time.sleep(0.2)
        assert wait_until_gone(tag_of(folder)) < 30
    assert not still_listening(sockets)
    return process.returncode, log.read_text()


def test_after_a_good_run(make_config, write, tmp_path):
    code, said = run_to_the_end(write(make_config(last_stage="judge")), tmp_path)
    assert code == 0, said


def test_after_shards_that_fail(make_config, write, tmp_path):
    config = make_config(last_stage="judge", ingest={"max_drop_fraction": 0})
    code, said = run_to_the_end(write(config), tmp_path)
    assert code == 1
    assert "error: stage ingest:" in said and "more than max_drop_fraction 0.0" in said
    assert not temporaries(config.root)


def test_after_a_worker_that_cannot_start(make_config, models, write, tmp_path):
    # what headers do not tell: a weight that is no number
    broken = tmp_path / "llava"
    shutil.copytree(models["llava"], broken)
    weights = load_file(broken / "model.safetensors")
    next(value for name, value in weights.items() if "embed_tokens" in name)[0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = make_config(trainings={"train": {"model": {"mllm": broken}}})
    code, said = run_to_the_end(write(config), tmp_path)
    assert code == 1
    assert "error: stage prompt_features: its worker could not start" in said


@pytest.mark.parametrize(
    ("number", "to_all", "stage", "code"),
    [
        (signal.SIGTERM, False, "ingest", 143),
        (signal.SIGTERM, True, "image_features", 143),
        (signal.SIGINT, True, "ingest", 130),
    ],
)
def test_after_a_signal_in_the_middle(make_config, write, tmp_path, number, to_all, stage, code):
    """A terminal's Ctrl-C reaches Ray's processes too; a scheduler's SIGTERM often the driver alone."""
    config = make_config()
    log, path, tag = tmp_path / "log", write(config), tag_of(tmp_path)
    with tagged_process(run_command(path), tag, log) as process:
        until(lambda: stage_at_work(config.root) == stage and bool(actors_of(process.pid, tag)), process, log)
        sockets = listening_sockets(list(tagged(tag)))
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(60) == code, log.read_text()
        assert wait_until_gone(tag) < 30
    assert not still_listening(sockets)
    if stage == "ingest":
        assert sockets, "the driver serves the scenes"
    assert "Traceback" not in log.read_text()
    assert not temporaries(config.root)
    assert not (config.root / stage / "manifest.json").exists()
    finished, said = run_to_the_end(path, tmp_path)
    assert finished == 0, said


def test_after_sigterm_while_ray_starts(make_config, write, tmp_path):
    log, tag = tmp_path / "log", tag_of(tmp_path)
    with tagged_process(run_command(write(make_config())), tag, log) as process:
        until(lambda: any("gcs_server" in words[0] for words in tagged(tag).values() if words), process, log)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
        assert wait_until_gone(tag) < 30
