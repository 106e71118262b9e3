"""What a trained LAP scores without some of its taps."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from repfusion.evaluation.__main__ import main
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import EvaluationConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import save_checkpoint

CONFIG = {"suites.scenes.num_prompts": 6, "sampler.num_steps": 2, "device": "cpu"}


def saved(generator: TextToImage, folder: Path) -> Path:
    save_checkpoint(folder, generator, dict(generator.trainable_state()), step=1)
    return folder


@pytest.fixture
def checkpoint(make_generator, tmp_path) -> Path:
    """LAP over the taps 0, 1 and -1."""
    return saved(make_generator("lap"), tmp_path / "step_00000001")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    overrides = [f"{key}={value}" for key, value in CONFIG.items()]
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments), *overrides])
    main()


def outputs(folder: Path) -> np.ndarray:
    return np.load(folder / "scenes" / "outputs/00000.npy")


@pytest.mark.slow
def test_every_set_is_drawn_scored_and_written_beside_all_taps(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command(
        monkeypatch, checkpoint, "--out", out, "--drop-taps", "0", "--drop-taps", "0,1", "--drop-taps=-1,0"
    )
    folders = ["all", "without_0", "without_0_1", "without_-1_0"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == folders
    written = json.loads((out / "taps.json").read_text())
    assert [(one["folder"], one["dropped"]) for one in written] == list(
        zip(folders, [[], [0], [0, 1], [-1, 0]], strict=True)
    )
    assert all(
        "eval/overall" in one["metrics"] and (out / one["folder"] / "gallery.png").is_file()
        for one in written
    )
    drawn = [outputs(out / folder).astype(int) for folder in folders]
    assert all(np.abs(one - other).max() > 0 for i, one in enumerate(drawn) for other in drawn[:i])
    config = EvaluationConfig.model_validate(
        {"suites": {"scenes": {"num_prompts": 6}}, "sampler": {"num_steps": 2}, "device": "cpu"}
    )
    evaluate_checkpoint(checkpoint, tmp_path / "plain", config)
    np.testing.assert_array_equal(outputs(tmp_path / "plain"), drawn[0])
    kept = config.model_copy(update={"dropped_taps": (0,)})
    assert evaluate_checkpoint(checkpoint, out / "without_0", kept).config.dropped_taps == (0,)


@pytest.mark.parametrize(
    ("method", "dropped", "says"),
    [
        ("lap", "0,7", r"dropped_taps name \[7\]; the checkpoint's LAP has the taps \[0, 1, -1\]"),
        ("lap", "0,1,-1", "name all taps .* leave one"),
        ("text_embed", "1", "pools no layers; expected lap, or noisy_latents with lap"),
    ],
)
def test_taps_that_cannot_be_dropped_are_named(make_generator, tmp_path, monkeypatch, method, dropped, says):
    checkpoint = saved(make_generator(method), tmp_path / "step_00000001")
    with pytest.raises(SystemExit, match=says):
        command(monkeypatch, checkpoint, "--out", tmp_path / "out", f"--drop-taps={dropped}")
    assert not (tmp_path / "out").exists()
