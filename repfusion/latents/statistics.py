"""Features -> exact per-position, per-channel mean and variance, by Welford's update in float64 (Chan et al.
1979 for the merge).

RAE normalises latents with data-set statistics; a momentum estimate would make them depend on order and batch
size. Here, merging shards in a fixed order gives the same bits whoever computed them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load, save_file
from torch import Tensor

VARIANCE_EPS = 1e-5


@dataclass
class LatentStatistics:
    """`mean` and the summed squared deviations `m2`, both `[n, d]` float64, of `count` images."""

    count: int
    mean: Float64[Tensor, "n d"]
    m2: Float64[Tensor, "n d"]
    _by_device: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def empty(cls, num_tokens: int, dim: int) -> "LatentStatistics":
        return cls(
            0,
            torch.zeros(num_tokens, dim, dtype=torch.float64),
            torch.zeros(num_tokens, dim, dtype=torch.float64),
        )

    @property
    def var(self) -> Float64[Tensor, "n d"]:
        """Population variance. Raises ValueError where nothing was counted."""
        if self.count == 0:
            raise ValueError("latent statistics of no images: run the latents stage on a non-empty data set")
        return self.m2 / self.count

    def update(self, features: Float[Tensor, "b n d"]) -> None:
        """Adds a batch of features."""
        batch = features.detach().to("cpu", torch.float64)
        mean = batch.mean(0)
        self.merge(LatentStatistics(len(batch), mean, (batch - mean).square().sum(0)))

    def merge(self, other: "LatentStatistics") -> None:
        """Adds another set's statistics; rounding depends on the order: keep it fixed where bits matter."""
        total = self.count + other.count
        if total == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total
        self._by_device.clear()

    def normalise(self, features: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """Features -> latents, float32."""
        mean, std = self._mean_std(features.device)
        return (features.float() - mean) / std

    def denormalise(self, latents: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
        """Latents -> features, float32."""
        mean, std = self._mean_std(latents.device)
        return latents.float() * std + mean

    def _mean_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Kept: a copy to a GPU in every step would hold it up."""
        if device not in self._by_device:
            std = (self.var + VARIANCE_EPS).sqrt()
            self._by_device[device] = self.mean.to(device, torch.float32), std.to(device, torch.float32)
        return self._by_device[device]

    def save(self, path: str | Path) -> None:
        save_file(
            {"count": torch.tensor(self.count), "mean": self.mean.contiguous(), "m2": self.m2.contiguous()},
            str(path),
        )

    @classmethod
    def load(cls, path: str | Path) -> "LatentStatistics":
        """Raises ValueError where the file is missing or holds something else."""
        if not Path(path).is_file():
            raise ValueError(f"latent statistics {path}: no such file; run the latents stage first")
        return cls.parse(Path(path).read_bytes(), str(path))

    @classmethod
    def parse(cls, data: bytes, place: str) -> "LatentStatistics":
        """What `save` wrote into the file at `place`. Raises ValueError where it is something else."""
        tensors = load(data)
        if tensors.keys() != {"count", "mean", "m2"}:
            raise ValueError(f"latent statistics {place}: holds {sorted(tensors)}, expected count, m2, mean")
        return cls(int(tensors["count"]), tensors["mean"], tensors["m2"])
