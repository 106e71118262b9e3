"""Images of a folder -> scores that say of how many."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_judges import save_always

from repfusion.config import validate
from repfusion.evaluation.folder import ScoredFolderConfig, score_folder


def png(side: int = 16, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    return save_always(tmp_path_factory.mktemp("judge"), "Yes")


def config_of(tmp_path: Path, judge: Path, **fields) -> ScoredFolderConfig:
    prompts = {key: {"prompt": key} for key in ("one", "two", "three")}
    (tmp_path / "g.json").write_text(json.dumps(prompts))
    suite = {"kind": "genai", "file": str(tmp_path / "g.json"), "judge": {"folder": str(judge)}, **fields}
    return validate(ScoredFolderConfig, {"suite": suite, "device": "cpu"})


def test_missing_and_broken_images_are_counted(judge, tmp_path):
    images = tmp_path / "images"
    (images / "two" / "samples").mkdir(parents=True)
    (images / "one.png").write_bytes(png())
    (images / "two" / "samples" / "0000.png").write_bytes(png()[:200])
    config, out = config_of(tmp_path, judge), tmp_path / "out"
    scores = score_folder(images, config, out).scores
    assert scores.values["vqascore"] == pytest.approx(1 / 3, abs=1e-5) and scores.values[
        "judged"
    ] == pytest.approx(1 / 3)
    assert scores.counts["missing/missing_image"].correct == 1
    assert scores.counts["missing/undecodable_image"].correct == 1
    assert scores.by_item["three"] == 0 and scores.reasons["three"] == "missing_image: 1 of 1 images"
    lines = [json.loads(line) for line in (out / "answers/00000.jsonl").read_text().splitlines()]
    assert [len(line) for line in lines] == [1, 1, 1] and lines[1][0]["missing"] == "undecodable_image"
    made = (out / "answers/00000.jsonl").stat().st_mtime_ns
    assert score_folder(images, config, out).scores == scores
    assert (out / "answers/00000.jsonl").stat().st_mtime_ns == made  # not judged again
    (images / "one.jpg").write_bytes(png())
    with pytest.raises(ValueError, match=r"2 files of item one .* expected 1; take the others away"):
        score_folder(images, config, out)
    with pytest.raises(ValueError, match="no such folder of images"):
        score_folder(tmp_path / "nowhere", config, out)


@pytest.mark.slow
def test_grids_are_cut_apart_and_the_command_says_of_how_many(judge, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(png(33))
    config = config_of(tmp_path, judge, num_images=4)
    values = {**config.model_dump(mode="json"), "grid": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "repfusion.evaluation.folder",
        str(tmp_path / "images"),
        str(tmp_path / "c.yaml"),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "judged                   0.3333  (4/12)" in done.stdout
    assert "missing/missing_image    8/12" in done.stdout
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "suite.official=true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "the official file has 1600 or 527" in done.stderr
