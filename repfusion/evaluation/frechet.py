"""A vector of features for each image -> their exact mean and covariance, in float64; two files of these ->
the Frechet distance of the sets (FID, arXiv 1706.08500): `python -m repfusion.evaluation.frechet A B`.

What is kept does not grow with the images: 8 bytes x width squared, 8 MiB at 1,024. Parts are merged one at a
time (Chan et al. 1979), so that neither the number of images nor that of the workers that made the parts
decides what is held, and in a fixed order the result has the same bits whoever made them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from repfusion.evaluation.suites.likeness import normal_distance
from repfusion.files import atomic_path

KEY = "features"
"""Name of what the features are in a file's metadata."""


@dataclass
class FeatureStatistics:
    """`mean` and `scatter`, the sum of outer products of deviations from it, of `count` vectors."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]
    features: Mapping[str, str]
    """What the features are: names and values, such as the digest of the encoder's weights. Those of two sets
    that are merged or compared have to be the same.
    """

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "n d"], features: Mapping[str, str]) -> "FeatureStatistics":
        """Statistics of a few vectors."""
        exact = vectors.astype(np.float64)
        mean = exact.mean(0) if len(exact) else np.zeros(exact.shape[1])
        away = exact - mean
        return cls(len(exact), mean, away.T @ away, features)

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The sample covariance. Raises ValueError of fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"statistics of {self.count} images; expected at least 2")
        return self.scatter / (self.count - 1)

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds another set's; rounding depends on the order: keep it fixed where bits matter.

        Raises:
            ValueError: the other's features are others.
        """
        self.refuse_others(other)
        if not other.count:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def refuse_others(self, other: "FeatureStatistics") -> None:
        """Raises ValueError, with both values, where another set's features are others."""
        names = sorted(self.features.keys() | other.features.keys())
        wrong = [
            f"{name} {self.features.get(name)} and {other.features.get(name)}"
            for name in names
            if self.features.get(name) != other.features.get(name)
        ]
        if len(self.mean) != len(other.mean):
            wrong.append(f"width {len(self.mean)} and {len(other.mean)}")
        if wrong:
            raise ValueError(
                f"statistics of other features: {'; '.join(wrong)}. Make both by one encoder at one size"
            )

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        tensors = {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), {KEY: json.dumps(dict(self.features), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """What `save` wrote. Raises ValueError where the file is none."""
        try:
            with safe_open(str(path), "np") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
                features = json.loads((file.metadata() or {})[KEY])
            return cls(int(found["count"]), found["mean"], found["scatter"], features)
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no statistics of features ({error}); make it again") from error


def merged(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all parts, in their order; one is held at a time where they come one at a time.

    Raises:
        ValueError: there is no part, or their features differ.
    """
    found: FeatureStatistics | None = None
    for part in parts:
        if found is None:
            found = FeatureStatistics(part.count, part.mean, part.scatter.copy(), part.features)
        else:
            found.merge(part)
    if found is None:
        raise ValueError("no statistics to merge; expected at least one part")
    return found


def distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The Frechet distance of two sets.

    Raises:
        ValueError: their features are others, or a set has fewer than two images.
    """
    first.refuse_others(second)
    return normal_distance(first.mean, first.covariance, second.mean, second.covariance)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.evaluation.frechet", description=__doc__)
    parser.add_argument("files", nargs=2, type=Path, metavar="STATISTICS.safetensors")
    try:
        first, second = (FeatureStatistics.load(path) for path in parser.parse_args().files)
        print(f"{distance(first, second):.6f} ({first.count} and {second.count} images)")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
