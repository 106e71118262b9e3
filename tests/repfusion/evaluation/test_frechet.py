"""Statistics for Frechet distances: exact in any order of parts, the same bits in one, refused of others."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.linalg import sqrtm

from repfusion.evaluation.frechet import FeatureStatistics, distance, merged
from repfusion.evaluation.suites.likeness import frechet_distance

FEATURES = {"encoder": "abc", "image_size": "32"}


def vectors(num: int, seed: int = 0, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # far from zero, where sums of squares would lose what deviations keep
    return (rng.normal(size=(num, width)) @ rng.normal(size=(width, width)) + 1e4 + seed).astype(np.float32)


def parts(data: np.ndarray, size: int) -> list[FeatureStatistics]:
    return [FeatureStatistics.of(data[i : i + size], FEATURES) for i in range(0, len(data), size)]


def test_merged_parts_are_the_whole():
    data = vectors(101)
    exact = data.astype(np.float64)
    for size in (1, 7, 101):
        found = merged(iter(parts(data, size)))
        assert found.count == 101
        np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-7, atol=1e-9)
    empty = FeatureStatistics.of(np.empty((0, 6)), FEATURES)
    for order in ([empty, *parts(data, 50)], [*parts(data, 50), empty]):
        np.testing.assert_allclose(merged(order).covariance, np.cov(exact, rowvar=False), rtol=1e-7)
    with pytest.raises(ValueError, match="no statistics to merge"):
        merged([])
    with pytest.raises(ValueError, match="statistics of 1 images; expected at least 2"):
        _ = FeatureStatistics.of(data[:1], FEATURES).covariance


def test_the_distance_is_that_of_the_formula(tmp_path):
    ours, theirs = vectors(200), vectors(150, seed=1)
    found = distance(merged(parts(ours, 64)), merged(parts(theirs, 64)))
    one, other = ours.astype(np.float64), theirs.astype(np.float64)
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    shift = ((one.mean(0) - other.mean(0)) ** 2).sum()
    by_hand = shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found == pytest.approx(by_hand, rel=1e-6)
    assert frechet_distance(one, other) == pytest.approx(by_hand, rel=1e-6)
    files = [tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"]
    for path, data in zip(files, (ours, theirs), strict=True):
        merged(parts(data, 64)).save(path)
    loaded = FeatureStatistics.load(files[0])
    again = merged(parts(ours, 64))
    assert loaded.features == FEATURES and np.array_equal(loaded.scatter, again.scatter)
    command = [sys.executable, "-m", "repfusion.evaluation.frechet", *map(str, files)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"{found:.6f} (200 and 150 images)\n"


def test_statistics_of_others_are_refused(tmp_path):
    own = FeatureStatistics.of(vectors(5), FEATURES)
    other = FeatureStatistics.of(vectors(5), {**FEATURES, "image_size": "64", "layer": "-1"})
    for refuse in (lambda: own.merge(other), lambda: distance(own, other)):
        with pytest.raises(ValueError, match="image_size 32 and 64; layer None and -1"):
            refuse()
    with pytest.raises(ValueError, match="width 6 and 5"):
        distance(own, FeatureStatistics.of(vectors(5, width=5), FEATURES))
    (tmp_path / "x").write_bytes(b"nothing")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=f"{name}: no statistics of features"):
            FeatureStatistics.load(tmp_path / name)
