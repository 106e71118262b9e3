"""The UniFusion base and the editing demo, a few steps long: their workflows as they are shipped, on the
shipped language model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import manifests, ran, run_all

from pipelines.config import WorkflowConfig
from repfusion.config import load_config
from repfusion.evaluation.record import read_evaluation
from repfusion.generate import generate
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray]
CONFIGS = Path(__file__).parents[3] / "pipelines" / "configs"
STEPS = 4


def small(training: str, **more: Any) -> list[str]:
    """Overrides that leave of a shipped workflow what takes seconds."""
    values = {
        "source.num_samples": 48,
        "source.shard_size": 24,
        f"trainings.{training}.num_steps": STEPS,
        f"trainings.{training}.checkpoint_every_steps": STEPS,
        f"trainings.{training}.global_batch_size": 8,
        f"trainings.{training}.engine.micro_batch_size": 4,
        f"trainings.{training}.engine.warmup_steps": 1,
        f"trainings.{training}.engine.decay_steps": 1,
        "evaluate.sampler.num_steps": 2,
        "evaluate.beside_training": False,  # it would wait for time that a busy machine never has to spare
        "evaluate.suites.scenes.num_prompts": 6,
        "ray.num_cpus": 2,
        "ray.object_store_mib": 80,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def test_the_demo_edits_from_a_base(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    first = tmp_path / "unifusion_base"
    shorter = {"evaluate.suites.as_they_are.num_prompts": 6}
    overrides = small("train", root=first, **shorter)
    base = load_config(WorkflowConfig, CONFIGS / "unifusion_base.yaml", overrides)
    made = manifests(run_all(base, pool)[0])
    assert made["rewrites"].samples == made["curate"].samples == 48
    evaluated = read_evaluation(first / "evaluate" / f"step_{STEPS:08d}")
    assert evaluated is not None and set(evaluated.suites) == {"scenes", "as_they_are"}
    checkpoint = first / "train" / "checkpoints" / f"step_{STEPS:08d}"

    mix = {
        f"trainings.edit.data.mix.scenes.{key}": first / stage
        for key, stage in {
            "images": "curate",
            "columns.image_features": "image_features",
            "columns.rewrites": "rewrites",
        }.items()
    }
    sizes = {
        "evaluate.suites.edits.num_edits": 12,
        "evaluate.suites.edits_as_they_are.num_edits": 12,
        "evaluate.suites.references.num_compositions": 4,
    }
    start = {"root": tmp_path / "demo_edit", "trainings.edit.init_from": checkpoint}
    overrides = small("edit", **start, **mix, **sizes)
    config = load_config(WorkflowConfig, CONFIGS / "demo_edit.yaml", overrides)
    # the base's geometry and habits
    assert config.trainings["edit"].model.dit == base.trainings["train"].model.dit
    assert config.trainings["edit"].model.conditioning == base.trainings["train"].model.conditioning
    results, _ = run_all(config, pool)
    assert "edit" in ran(results) and ran(run_all(config, pool)[0]) == []
    # the language model writes what the edited image shows
    assert (made := manifests(results)["rewrites"]).samples == 48 and made.drops == {}

    evaluation = read_evaluation(config.root / "evaluate" / f"step_{STEPS:08d}")
    assert evaluation is not None
    assert set(evaluation.suites) == {"edits", "edits_as_they_are", "references", "scenes"}
    assert evaluation.first.scores.values["copy_kept"] > evaluation.first.scores.values["chance_kept"]
    page = (config.root / "report.html").read_text()
    assert "a copy of the source, kept" in page and "<code>" + str(checkpoint) in page
    # a row of the gallery is sources and results in turn
    assert Image.open(config.root / "gallery.png").size[0] > 6 * 128

    model = load_checkpoint(config.root / "edit" / "checkpoints" / f"step_{STEPS:08d}")
    source = np.zeros((64, 64, 3), np.uint8)
    drawn = [
        generate(model, model.load_decoder(), [Request("a red circle", images)], 0)
        for images in ((), (source,))
    ]
    assert drawn[0].shape == drawn[1].shape == (1, 3, 64, 64) and not drawn[0].equal(drawn[1])
