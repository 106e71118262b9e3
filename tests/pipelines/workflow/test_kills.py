"""Rounds of SIGKILL at random moments: a run survives its actors, others are done again, and every byte is as
if nothing had happened. benchmarks/kills.py has more rounds.
"""

import random
from pathlib import Path

import pytest
import yaml
from killing import Target, contents, differences, reference, run_round

from repfusion.config import to_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_killed_runs_end_in_the_bytes_of_an_undisturbed_one(make_config, tmp_path):
    config = tmp_path / "workflow.yaml"
    values = yaml.safe_load(to_yaml(make_config()))
    del values["trainings"]["train"]["output_dir"]  # follows each round's root
    config.write_text(yaml.safe_dump(values))
    expected, _ = reference(config, tmp_path / "reference", tmp_path / "reference.log")
    assert sum(name.endswith(".tar") for name in expected) == 20  # images, raw, curated, latents, features
    rng = random.Random(0)
    targets: list[Target] = ["driver", "actor", "raylet", "driver", "actor"]
    for number, target in enumerate(targets):
        done = run_round(config, tmp_path / f"round{number}", expected, rng, [target])
        assert done.problems == [], f"{done}\n{(tmp_path / f'round{number}.log').read_text()}"


def test_the_comparison_finds_a_changed_byte_and_a_file_too_many(tmp_path: Path):
    for root in ("a", "b"):
        (tmp_path / root / "image_features").mkdir(parents=True)
        (tmp_path / root / "image_features" / "00000.tar").write_bytes(b"same")
        (tmp_path / root / "image_features" / "00000.json").write_text(
            f'{{"sha256": "x", "seconds": {len(root)}}}'
        )
    assert differences(contents(tmp_path / "a"), contents(tmp_path / "b")) == []
    (tmp_path / "b" / "image_features" / "00000.tar").write_bytes(b"some")
    (tmp_path / "b" / "image_features" / ".00001.x.tmp").write_bytes(b"")
    assert differences(contents(tmp_path / "a"), contents(tmp_path / "b")) == [
        "image_features/.00001.x.tmp is left over",
        "image_features/00000.tar differs",
    ]
