"""The base checkpoint's columns, and what is released of its training."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from repfusion.foundation import base
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint
from repfusion.scenes.world import NEW_COLOUR, NEW_SHAPE, draw_scene, render


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def test_the_bases_columns_hold_captions_and_features_of_known_things_alone(
    foundation, tmp_path, monkeypatch
):
    monkeypatch.setattr(base, "WEIGHTS", foundation)
    monkeypatch.setattr(base, "SHARD_SAMPLES", 10)
    base.prepare(tmp_path, 25)
    texts, rows = [], []
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        captions, latents = members(tmp_path / "captions" / name), members(tmp_path / "image_features" / name)
        keys = sorted({key.split(".")[0] for key in captions})
        assert keys == sorted(key.split(".")[0] for key in latents)
        for key in keys:
            alternatives = json.loads(captions[f"{key}.json"])["captions"]
            assert len(alternatives) == base.CAPTIONS_PER_SCENE
            assert captions[f"{key}.txt"].decode() == alternatives[0]
            texts += alternatives
            rows.append(np.load(io.BytesIO(latents[f"{key}.image_features.npy"])))
    assert len(rows) == 25
    assert not any(NEW_SHAPE in text or NEW_COLOUR in text for text in texts)
    statistics = LatentStatistics.load(tmp_path / "image_features" / "statistics.safetensors")
    assert statistics.count == 25 and statistics.tokens is not None
    np.testing.assert_allclose(statistics.mean.numpy(), np.stack(rows).astype(np.float64).mean(0), atol=1e-12)
    assert not any(word in text for text in texts for word in ("rhombus", "turquoise"))
    world = base.base_world(32)
    pixels = torch.from_numpy(render(draw_scene(base.FIRST_SEED + 13, world), world))[None]
    expected = RepresentationEncoder.from_pretrained(foundation / "vision_tower")(pixels)[0].half().numpy()
    np.testing.assert_allclose(rows[13].astype(np.float32), expected.astype(np.float32), atol=4e-3)


def test_a_released_base_is_the_last_checkpoints_average_in_half_precision(make_generator, tmp_path):
    generator = make_generator()
    ema = {name: p.detach() + 0.1 for name, p in generator.trainable_state().items()}
    save_checkpoint(
        tmp_path / "checkpoints" / "step_00000003", generator, generator.trainable_state(), step=3
    )
    save_checkpoint(tmp_path / "checkpoints" / "step_00000020", generator, ema, step=20)
    base.release(tmp_path / "checkpoints", tmp_path / "base")
    released = load_checkpoint(tmp_path / "base")
    for name, parameter in released.trainable_state().items():
        assert torch.equal(parameter, ema[name].half().float())
    assert json.loads((tmp_path / "base" / "complete.json").read_text())["step"] == 20
    assert torch.equal(released.statistics.mean, generator.statistics.mean)
    fixed = generator.fixed_state()
    assert len(fixed) == 2 and all(torch.equal(released.fixed_state()[name], fixed[name]) for name in fixed)
    with pytest.raises(ValueError, match="no complete checkpoint; train first"):
        base.release(tmp_path / "empty", tmp_path / "other")
