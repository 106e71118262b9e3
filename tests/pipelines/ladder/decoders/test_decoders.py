"""Decoders compared on scenes: what is due and what lacks, measures by hand, and a small comparison run in
parts.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny_critics import write_lpips
from tiny_shards import write_shards

from pipelines.ladder.decoders import __main__ as command
from pipelines.ladder.decoders.measure import FIRST_SEED, DecoderBench, looks_of, looks_of_scene, sharpness
from pipelines.ladder.decoders.page import page_of
from pipelines.ladder.decoders.plan import DecoderPlan
from pipelines.ladder.decoders.result import DecoderResult
from pipelines.ladder.decoders.run import due, results_of, run_plan
from pipelines.ladder.results import read
from repfusion.config import to_yaml
from repfusion.decoding.config import DecoderRecipe, DrawingConfig, PerceptualConfig
from repfusion.foundation.config import LengthConfig
from repfusion.latents.load import EncoderConfig
from repfusion.scenes.world import WorldConfig, draw_scene, render, to_uint8

WORLD = WorldConfig(image_size=32)


@pytest.fixture
def plan(tmp_path: Path, models: dict[str, Path]) -> DecoderPlan:
    images = [to_uint8(render(draw_scene(seed, WORLD), WORLD)) for seed in range(12)]
    return DecoderPlan(
        images=write_shards(tmp_path / "curate", images, 2),
        out=tmp_path / "compared",
        encoder=EncoderConfig(path=models["tower"]),
        judge=EncoderConfig(path=models["tower"], image_size=64),
        world=WORLD,
        num_scenes=6,
        seeds=(0, 1),
        recipe=DecoderRecipe(
            hidden_size=48, depth=1, num_heads=2, length=LengthConfig(num_steps=2, batch_size=4)
        ),
        drawing=DrawingConfig(patch_size=4, num_steps=2),
    )


def test_what_is_due_and_what_lacks(plan, tmp_path):
    assert due(plan) == [("l1", 0), ("drawing", 0), ("l1", 1), ("drawing", 1)]
    assert plan.lacks("perceptual") == "lpips not given" and plan.lacks("gan") == "lpips and dino not given"
    page = page_of(plan, [])
    assert "No results yet." in page and "- L1 + perceptual + GAN: lpips and dino not given" in page
    judged = plan.model_copy(update={"lpips": write_lpips(tmp_path / "lpips")})
    assert ("perceptual", 0) in due(judged) and judged.lacks("gan") == "dino not given"
    weights = [judged.recipe_of(row).perceptual for row in ("l1", "perceptual", "drawing")]
    assert [one.weight for one in weights if one is not None] == [0, 1, 0]
    # another recipe is another budget, with a folder of its own
    longer = plan.recipe.model_copy(update={"length": LengthConfig(num_steps=3, batch_size=4)})
    other = plan.model_copy(update={"recipe": longer})
    assert other.budget() != plan.budget() and other.training("l1", 0).out != plan.training("l1", 0).out
    assert plan.model("l1") == other.model("l1") != plan.model("drawing")
    shared = plan.recipe.model_copy(update={"perceptual": PerceptualConfig(path=tmp_path)})
    with pytest.raises(ValueError, match=r"recipe\.perceptual is given, in which the rows differ"):
        DecoderPlan.model_validate({**plan.model_dump(), "recipe": shared.model_dump()})


def test_measures_of_scenes_as_they_are():
    scene = draw_scene(FIRST_SEED, WORLD)
    assert looks_of(render(scene, WORLD)) == looks_of_scene(scene)
    edge = torch.zeros(1, 3, 5, 6)
    edge[..., 3:] = 1
    # of four inner columns, the two beside the edge have a Laplacian of 1 and -1
    assert sharpness(edge) == pytest.approx(0.5) and sharpness(edge * 0) == 0


def test_a_page_holds_means_and_what_failed(plan):
    def line(seed: int, distance: float, **changes) -> DecoderResult:
        named = {"row": "l1", "seed": seed, "budget": plan.budget(), "model": plan.model("l1")}
        measures = {"frechet_distance": distance, "psnr_db": 20.0}
        return DecoderResult(
            **{**named, "budget_name": "decoders", "time": "", "measures": measures, **changes}
        )

    page = page_of(plan, [line(0, 1.0), line(1, 3.0), line(1, 9.0, budget="another")])
    assert "2.000 ± 1.414" in page and "9.0" not in page and "SSIM" not in page
    assert "- diffusion decoder: seeds 0, 1 are due" in page
    page = page_of(plan, [line(0, 1.0), line(1, 0.0, status="failed", error="not finite", measures={})])
    assert "- L1, seed 1: not finite" in page and "1.000" in page


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(plan, tmp_path, monkeypatch, capsys):
    (first,) = run_plan(plan, most=1)
    assert (first.row, first.seed) == ("l1", 0)
    assert set(first.measures) >= {"frechet_distance", "sharpness", "detector_agreement", "psnr_db", "ssim"}
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(plan))
    monkeypatch.setattr(sys, "argv", ["decoders", str(path)])
    command.main()
    said = capsys.readouterr().out
    assert (
        "perceptual: not run: lpips not given" in said and "3 trainings, 0 of them failed, 0 are due" in said
    )
    lines = read(results_of(plan), DecoderResult)
    assert [(one.row, one.seed) for one in lines] == [("l1", 0), ("drawing", 0), ("l1", 1), ("drawing", 1)]
    page = (plan.out / "comparison.md").read_text()
    assert "| diffusion decoder | 2 |" in " ".join(page.split()) and "are due" not in page
    assert (plan.out / str(lines[1].picture)).is_file()
    assert run_plan(plan) == []
    wrong = plan.model_copy(update={"world": WorldConfig(image_size=64)})
    with pytest.raises(ValueError, match=r"world\.image_size is 64, the encoder takes 32 px"):
        DecoderBench(wrong, torch.device("cpu"))
