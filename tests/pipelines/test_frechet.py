"""Frechet statistics by actors: the same bits for any number of them, and what was made stays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import write_shards

from pipelines import frechet
from pipelines.frechet import FrechetConfig, FrechetWorker, frechet_statistics, part_of
from pipelines.runtime.pool import ActorsConfig
from pipelines.runtime.session import RayConfig
from repfusion.evaluation.frechet import FeatureStatistics
from repfusion.latents.load import EncoderConfig


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Path]) -> FrechetConfig:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(22)]
    return FrechetConfig(
        images=write_shards(tmp_path / "curate", images, 3),
        out=tmp_path / "real.safetensors",
        encoder=EncoderConfig(path=models["tower"]),
        batch_size=5,
        actors=ActorsConfig(num_actors=1, num_cpus=1),
        ray=RayConfig(num_cpus=2),
    )


def test_a_shards_statistics_are_those_of_its_images_features(config):
    worker = FrechetWorker(config)
    name, found = worker.run("00000", {"encoder": "x"})
    sources = frechet.image_batches(
        frechet.Folder.at(str(config.images)), name, None, worker.encoder.image_size, 100
    )
    ((_, images),) = sources
    features = worker.encoder.encode_images(torch.from_numpy(images)).features.double().mean(1).numpy()
    assert found.count == len(features) > 5
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.ray
def test_two_actors_give_the_bits_of_one_and_go_on_where_they_stopped(config, tmp_path):
    one = frechet_statistics(config)
    assert one.count == 22 and np.array_equal(one.scatter, FeatureStatistics.load(config.out).scatter)
    two = config.model_copy(
        update={"out": tmp_path / "two.safetensors", "actors": ActorsConfig(num_actors=2, num_cpus=1)}
    )
    frechet_statistics(two)
    whole = config.out.read_bytes()
    assert two.out.read_bytes() == whole
    kept = part_of(config, "00001")
    changed = kept.stat().st_mtime_ns
    part_of(config, "00000").unlink()
    part_of(config, "00002").write_bytes(b"cut off")
    frechet_statistics(config)
    assert config.out.read_bytes() == whole and kept.stat().st_mtime_ns == changed
