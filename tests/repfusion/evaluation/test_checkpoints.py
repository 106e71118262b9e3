"""A checkpoint is scored reproducibly, whatever the batch size, and what is written can be read back."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_training import make_columns, make_foundation, tiny_model

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import EvaluationConfig, read_evaluation
from repfusion.evaluation.shown import as_lines
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.runs.checkpoint import save_checkpoint
from repfusion.scenes.captions import TASKS

CONFIG = EvaluationConfig.model_validate(
    {
        "suites": {"scenes": {"num_prompts": 36}},
        "batch_size": 10,
        "sampler": SamplerConfig(num_steps=2),
        "device": "cpu",
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    columns = make_columns(root)
    statistics = LatentStatistics.load(columns / "image_features" / "statistics.safetensors")
    torch.manual_seed(0)
    generator = build_model(tiny_model(make_foundation(root)), statistics)
    folder = root / "checkpoints" / "step_00000007"
    ema = {name: p + 0.05 * torch.randn_like(p) for name, p in generator.trainable_state().items()}
    save_checkpoint(folder, generator, ema, step=7)
    return folder


def test_writes_scores_and_a_gallery_and_reads_them_back(checkpoint, tmp_path):
    evaluation = evaluate_checkpoint(checkpoint, tmp_path / "out", CONFIG)
    assert evaluation == read_evaluation(tmp_path / "out")
    assert evaluation.step == 7
    scenes = evaluation.suites["scenes"]
    assert len(scenes.scores.by_item) == scenes.num_items == 36
    assert {scenes.scores.counts[f"task/{task}"].total for task in TASKS} == {6}
    assert scenes.scores.values["overall"] == 0  # untrained: a 16 px image of noise
    assert len(scenes.scores.reasons) == 36 and all(scenes.scores.reasons.values())
    metrics, counting = evaluation.metrics(), scenes.scores.intervals["task/counting"]
    assert metrics["eval/task/counting"] == scenes.scores.values["task/counting"]
    limits = [metrics[f"eval/interval/task/counting_{end}"] for end in ("low", "high")]
    assert limits == [counting.low, counting.high] == pytest.approx([0, 0.390], abs=1e-3)
    position = next(line for line in as_lines(evaluation) if line.startswith("position"))
    assert position.startswith("position             0.000  [0.000, 0.390]  (0/6)")
    assert position.endswith("(strict: 0.000, by chance: 0.333, strict by chance: 0.167)")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["galleries", "gallery.png", "scenes", "scores.json"]
    items = [json.loads(line) for line in (tmp_path / "out" / "scenes" / "items.jsonl").open()]
    assert [item["key"] for item in items] == list(scenes.scores.by_item)
    assert all(item["prompt"] and item["truth"]["task"] in TASKS for item in items)
    assert Image.open(tmp_path / "out" / "gallery.png").size[0] > 6 * 128
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["config"]["sampler"]["num_steps"] == 2


def test_images_do_not_depend_on_the_batch_size(checkpoint, tmp_path):
    evaluate_checkpoint(checkpoint, tmp_path / "small", CONFIG)
    evaluate_checkpoint(checkpoint, tmp_path / "large", CONFIG.model_copy(update={"batch_size": 36}))
    small, large = (Image.open(tmp_path / name / "gallery.png") for name in ("small", "large"))
    differences = (abs(a - b) for a, b in zip(small.tobytes(), large.tobytes(), strict=True))
    assert max(differences) <= 1  # rounding to 8 bits


def test_averaged_weights_are_the_ones_scored(checkpoint, tmp_path):
    assert any(
        not torch.equal(tensor, load_file(str(checkpoint / "model.safetensors"))[name])
        for name, tensor in load_file(str(checkpoint / "ema.safetensors")).items()
    )
    evaluate_checkpoint(checkpoint, tmp_path / "ema", CONFIG)
    evaluate_checkpoint(checkpoint, tmp_path / "last", CONFIG.model_copy(update={"use_ema": False}))
    averaged, last = ((tmp_path / name / "gallery.png").read_bytes() for name in ("ema", "last"))
    assert averaged != last


def test_an_incomplete_checkpoint_is_refused_and_leaves_nothing(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        evaluate_checkpoint(tmp_path / "step_00000001", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
    assert read_evaluation(tmp_path / "out") is None


def test_one_that_was_cut_short_goes_on_without_drawing_what_is_there(checkpoint, tmp_path):
    first = evaluate_checkpoint(checkpoint, tmp_path, CONFIG)
    picture = (tmp_path / "gallery.png").read_bytes()
    for name in ("scores.json", "gallery.png"):
        (tmp_path / name).unlink()
    results = []

    def run(work):
        results.append(work())
        return results[-1]

    again = evaluate_checkpoint(checkpoint, tmp_path, CONFIG, run)
    assert again.suites == first.suites and (tmp_path / "gallery.png").read_bytes() == picture
    assert not any(isinstance(one, torch.Tensor | tuple) for one in results)  # neither drawn nor loaded
    assert evaluate_checkpoint(checkpoint, tmp_path, CONFIG.model_copy(update={"seed": 1})) != first
