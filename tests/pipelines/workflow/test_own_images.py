"""Somebody's own folder of images: trained, scored, reported and browsed, and no shape is ever spoken of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.browse import library_of
from pipelines.config import WorkflowConfig
from repfusion.config import load_config
from repfusion.data.order import is_held_out
from repfusion.evaluation.record import read_evaluation

ROOT = Path(__file__).parents[3]
NUM_IMAGES, SHARE = 60, 0.2


@pytest.mark.slow
@pytest.mark.ray
def test_own_images_are_trained_on_and_judged_as_what_they_are(tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (8, 10, 3), np.uint8)
        image = Image.fromarray(pixels).resize((100, 80), Image.Resampling.BICUBIC)
        image.save(photos / f"dog{number:03d}.png")
        (photos / f"dog{number:03d}.txt").write_text(f"the {number}th of them")
    training = {
        **{"num_steps": 4, "global_batch_size": 8, "checkpoint_every_steps": 2, "log_every_steps": 1},
        **{"num_workers": 1, "engine": {"micro_batch_size": 8, "warmup_steps": 1}},
        "data": {"held_out_share": SHARE},
    }
    path = tmp_path / "my.yaml"
    fields = {
        **{"root": str(tmp_path / "mine"), "source": {"kind": "folder", "path": str(photos)}},
        **{"ingest": {"image_size": 64}, "trainings": {"train": training}},
        "evaluate": {"sampler": {"num_steps": 2}},
    }
    path.write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-m", "pipelines", "run", str(path)]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^train: step \d+/4", done.stdout, re.M), "a step is said while it trains"
    assert f"report.html  {tmp_path / 'mine' / 'report.html'}" in done.stdout
    assert f"tracked      make mlflow ROOT={tmp_path / 'mine'}" in done.stdout

    config = load_config(WorkflowConfig, path)
    evaluation = read_evaluation(tmp_path / "mine" / "evaluate" / "step_00000004")
    assert evaluation is not None
    found = evaluation.suites["prompts"]
    assert evaluation.suites.keys() == {"prompts"} and found.scores.headline == "coverage"
    assert found.scores.values.keys() == {"coverage", "frechet_distance"} and not found.scores.by_item
    items = tmp_path / "mine" / "train" / "evaluations" / "step_00000004" / "prompts" / "items.jsonl"
    keys = [json.loads(line)["key"] for line in items.open()]
    assert keys and all(is_held_out(key, SHARE) for key in keys)
    page = (tmp_path / "mine" / "report.html").read_text()
    for word in ("shape", "detector", "triangle", "green frames"):
        assert word not in page
    assert "captions held out of training" in page and "Frechet distance" in page

    library = library_of(config)
    (shard,) = library.shards("curate")
    shown = library.answer(f"/curate/{shard}?q=7th%20of").body.decode()
    assert shown.count("<img ") == len([n for n in range(NUM_IMAGES) if f"{n}".endswith("7")])
