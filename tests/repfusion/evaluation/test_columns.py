"""Outputs, answers and scores are each made again only when what decides them changes; nothing half-written
is taken for whole.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import make_columns, make_foundation, tiny_model

from repfusion.evaluation.checkpoints import score_suite
from repfusion.evaluation.columns import answers_column, outputs_column
from repfusion.evaluation.draw import Drawing
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.base import Answer, Scores
from repfusion.generate import generate
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import save_checkpoint
from tests.extending.brightness import BrightnessConfig, BrightnessSuite

CONFIG = EvaluationConfig.model_validate({"sampler": {"num_steps": 1}, "batch_size": 4, "device": "cpu"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    root = tmp_path_factory.mktemp("model")
    statistics = LatentStatistics.load(make_columns(root) / "image_features" / "statistics.safetensors")
    return build_model(tiny_model(make_foundation(root)), statistics)


@pytest.fixture
def checkpoint(model: TextToImage, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step_00000002"
    save_checkpoint(folder, model, model.trainable_state(), step=2)
    return folder


class Counted:
    """Scores a suite, and counts batches drawn, calls of the judge and calls of the rule."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint, self.folder = checkpoint, folder

    def __call__(
        self, config: EvaluationConfig = CONFIG, rule: str = "above 1", **suite: Any
    ) -> tuple[Scores, tuple[int, int, int]]:
        calls: list[Any] = []

        def run(work: Callable[[], Any]) -> Any:
            calls.append(work.func if isinstance(work, functools.partial) else work)
            return work()

        counted = CountedSuite(BrightnessConfig(**suite), rule)
        scored = score_suite(
            counted, self.folder, Drawing(self.checkpoint, config, run), config.max_items, run
        )
        return scored.scores, (calls.count(generate), counted.num_judged, counted.num_scored)


class CountedSuite(BrightnessSuite):
    def __init__(self, config: BrightnessConfig, rule: str):
        super().__init__(config)
        self.rule_version, self.num_judged, self.num_scored = rule, 0, 0

    def look(self, items, outputs) -> list[Answer]:
        self.num_judged += 1
        return super().look(items, outputs)

    def score(self, items, answers) -> Scores:
        self.num_scored += 1
        return super().score(items, answers)


@pytest.fixture
def score(checkpoint: Path, tmp_path: Path) -> Counted:
    return Counted(checkpoint, tmp_path / "evaluated" / "brightness")


def test_what_is_there_is_not_made_again(score: Counted):
    first, calls = score()
    assert calls == (2, 1, 1)  # six images in batches of four
    assert score() == (first, (0, 0, 0))
    smaller = CONFIG.model_copy(update={"batch_size": 1})
    assert score(smaller) == (first, (0, 0, 0))  # it decides no image


def test_another_judge_answers_anew_without_drawing(score: Counted):
    mean, _ = score()
    brightest, calls = score(seen="brightest")
    assert calls == (0, 1, 1)
    assert brightest.values["mean"] > mean.values["mean"]
    images = np.load(score.folder / "outputs/00000.npy")
    assert brightest.values["mean"] == pytest.approx(images.reshape(6, -1).max(axis=1).mean() / 255)


def test_another_rule_scores_anew_without_judging(score: Counted):
    score()
    never, calls = score(rule="above 2", threshold=1.0)
    assert calls == (0, 0, 1) and never.values["bright"] == 0


def test_another_judge_that_answers_the_same_is_not_scored_again(score: Counted):
    first, _ = score(colours=("red",))
    answers = (score.folder / "answers/00000.jsonl").read_text()
    (score.folder / "answers/00000.identity.json").unlink()
    assert score(colours=("red",)) == (first, (0, 1, 0))
    assert (score.folder / "answers/00000.jsonl").read_text() == answers


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampler": CONFIG.sampler.model_copy(update={"num_steps": 2})}]
)
def test_another_seed_or_sampler_draws_again(score: Counted, change: dict[str, Any]):
    score()
    assert score(CONFIG.model_copy(update=change))[1][0] == 2


def test_another_checkpoint_of_the_same_step_is_drawn_again(
    score: Counted, checkpoint: Path, model: TextToImage
):
    score()
    save_checkpoint(checkpoint, model, model.trainable_state(), step=2)
    assert score()[1] == (0, 0, 0)  # the same weights
    other = {name: weights + 1 for name, weights in model.trainable_state().items()}
    save_checkpoint(checkpoint, model, other, step=2)
    assert score()[1] == (2, 1, 1)


def test_the_first_so_many_items_are_scored_and_their_noise_stays(score: Counted):
    score()
    images = np.load(score.folder / "outputs/00000.npy")
    scores, calls = score(CONFIG.model_copy(update={"max_items": 2}))
    assert calls == (1, 1, 1) and list(scores.by_item) == ["red", "green"]
    np.testing.assert_allclose(np.load(score.folder / "outputs/00000.npy"), images[:4], atol=1)
    items = [json.loads(line) for line in (score.folder / "items.jsonl").read_text().splitlines()]
    assert items[0] == {"key": "red", "prompt": "a red circle", "num_outputs": 2, "truth": {}}


def test_what_was_cut_short_or_changed_is_made_again(score: Counted):
    first, _ = score()
    path = score.folder / "outputs/00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert score() == (first, (2, 0, 0))  # the same images: answers and scores hold
    path.unlink()
    assert score() == (first, (2, 0, 0))
    (score.folder / "answers/00000.jsonl").write_text("[0.1, 0.1]\n")
    assert score() == (first, (0, 1, 0))
    (score.folder / "scores.identity.json").write_text("{")
    assert score() == (first, (0, 0, 1))
    assert not [file for file in score.folder.rglob("*") if file.suffix in (".tmp", ".lock")]


def test_a_file_written_by_one_that_was_killed_before_its_identity_is_not_believed(tmp_path: Path):
    column = outputs_column(tmp_path, 0)
    old, new = np.zeros((1, 2, 2, 3), np.uint8), np.ones((1, 2, 2, 3), np.uint8)
    column.get({"seed": 0}, lambda: old)
    with column.path.open("wb") as stream:
        np.save(stream, new)
    np.testing.assert_array_equal(column.get({"seed": 0}, lambda: old), old)


def test_one_that_fails_midway_leaves_what_was_there(tmp_path: Path):
    column = answers_column(tmp_path, 0)
    assert column.get({"judge": "1"}, lambda: [1]) == [1]
    with pytest.raises(ValueError, match="not JSON compliant"):
        column.get({"judge": "2"}, lambda: [float("nan")])
    assert column.get({"judge": "1"}, lambda: [2]) == [1]
