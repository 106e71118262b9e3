"""`python -m repfusion.train` and `python -m repfusion.evaluation`: arguments, and what bad ones get."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repfusion import train
from repfusion.evaluation import __main__ as evaluation

CONFIG = Path(train.__file__).parent / "configs" / "repfusion_7b_1.3b.yaml"
Command = Callable[..., None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(main: Callable[[], None], *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()

    return run


def test_overrides_may_stand_before_and_after_an_option(command: Command, capsys, monkeypatch, tmp_path):
    command(train.main, CONFIG, "num_steps=7", "--dry-run", "global_batch_size=64")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_steps"], shown["global_batch_size"]) == (7, 64)

    seen: dict[str, Any] = {}

    def evaluate(checkpoint: Path, out: Path, config: evaluation.EvaluationConfig):
        seen.update(checkpoint=checkpoint, out=out, config=config)
        raise ValueError("seen")

    monkeypatch.setattr(evaluation, "evaluate_checkpoint", evaluate)
    with pytest.raises(SystemExit, match="error: seen"):
        command(
            evaluation.main, "a", "suites.scenes.num_prompts=24", "--out", tmp_path, "sampler.num_steps=5"
        )
    assert (seen["checkpoint"], seen["out"]) == (Path("a"), tmp_path)
    assert (seen["config"].suites["scenes"].num_prompts, seen["config"].sampler.num_steps) == (24, 5)


def test_a_field_that_does_not_exist_is_said_without_a_traceback(command: Command, tmp_path):
    with pytest.raises(SystemExit, match=r"error: override: unknown key 'num_step'.*'num_steps'"):
        command(train.main, CONFIG, "num_step=7", "--dry-run")
    with pytest.raises(SystemExit, match=r"(?s)error: .*no_such.yaml"):
        command(train.main, tmp_path / "no_such.yaml")
    with pytest.raises(SystemExit, match=r"(?s)error: .*num_prompt\b"):
        command(evaluation.main, tmp_path, "suites.scenes.num_prompt=24")


def test_a_checkpoint_that_does_not_exist_is_said_without_a_traceback(command: Command, tmp_path):
    with pytest.raises(SystemExit, match=r"error: checkpoint .*nowhere does not exist"):
        command(evaluation.main, tmp_path / "nowhere")
