"""Features -> exact per-position, per-channel mean and variance, by Welford's update in float64 (Chan et al.
1979 for the merge).

RAE normalises latents with data-set statistics; a momentum estimate would make them depend on order and batch
size. Here, merging shards in a fixed order gives the same bits whoever computed them. Beside them stands what
the encoder's LayerNorm took of the tokens at each position, on average.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load, save_file
from torch import Tensor

from repfusion.inputs import map_tensors

VARIANCE_EPS = 1e-5
TENSORS, TOKEN_TENSORS = {"count", "mean", "m2"}, {"token_mean", "token_std"}
"""Names in a file of statistics; the latter are in those of encoders that end in a LayerNorm."""


class TokenScale(NamedTuple):
    """What an encoder's LayerNorm took of each token: its hidden state is `std * features + mean`."""

    mean: Float[Tensor, "*b n"]
    std: Float[Tensor, "*b n"]


@dataclass
class LatentStatistics:
    """`mean` and the summed squared deviations `m2`, both `[n, d]` float64, of `count` images."""

    count: int
    mean: Float64[Tensor, "n d"]
    m2: Float64[Tensor, "n d"]
    tokens: TokenScale | None = None
    """Mean over the images of what the LayerNorm took at each position, `[n]` float64. None where features
    are what the encoder computed.
    """
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

    @classmethod
    def of(cls, features: Float[Tensor, "b n d"], tokens: TokenScale | None = None) -> "LatentStatistics":
        """Statistics of a batch of features, summed on their device, with what the encoder's LayerNorm took
        of their tokens.
        """
        batch = features.detach().to(torch.float64)
        mean = batch.mean(0)
        if tokens is not None:
            tokens = TokenScale(*(one.detach().to(torch.float64).mean(0) for one in tokens))
        return cls(len(batch), mean, (batch - mean).square().sum(0), tokens)

    def update(self, features: Float[Tensor, "b n d"], tokens: TokenScale | None = None) -> None:
        """Adds a batch of features, with what the encoder's LayerNorm took of their tokens."""
        self.merge(map_tensors(self.of(features, tokens), Tensor.cpu))

    def merge(self, other: "LatentStatistics") -> None:
        """Adds another set's statistics; rounding depends on the order: keep it fixed where bits matter.

        Raises:
            ValueError: one of the two alone knows what a LayerNorm took.
        """
        total = self.count + other.count
        if total == 0:
            return
        self.tokens = self._merged_tokens(other)
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total
        self._by_device.clear()

    def _merged_tokens(self, other: "LatentStatistics") -> TokenScale | None:
        if self.count == 0 or other.count == 0:
            return self.tokens if self.count else other.tokens
        if self.tokens is None or other.tokens is None:
            if self.tokens is not other.tokens:
                raise ValueError(
                    "latent statistics of some images have token_mean and token_std, of others not: encode "
                    "all of them by one version of the code"
                )
            return None
        share = other.count / (self.count + other.count)
        pairs = zip(self.tokens, other.tokens, strict=True)
        return TokenScale(*(own + (theirs - own) * share for own, theirs in pairs))

    def hidden_state(self) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]:
        """Scale and shift by which latents become the encoder's hidden states before its LayerNorm, each
        token's own mean and scale replaced by the mean of its position; features, where no LayerNorm took
        anything.
        """
        scale, shift = (self.var + VARIANCE_EPS).sqrt(), self.mean
        if self.tokens is None:
            return scale, shift
        mean, std = (one[:, None] for one in self.tokens)
        return std * scale, std * shift + mean

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
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "m2": self.m2}
        if self.tokens is not None:
            tensors |= {"token_mean": self.tokens.mean, "token_std": self.tokens.std}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))

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
        has_tokens = tensors.keys() == TENSORS | TOKEN_TENSORS
        if tensors.keys() != TENSORS and not has_tokens:
            raise ValueError(
                f"latent statistics {place}: holds {sorted(tensors)}, expected count, m2, mean, with "
                "token_mean and token_std or without"
            )
        tokens = TokenScale(tensors["token_mean"], tensors["token_std"]) if has_tokens else None
        return cls(int(tensors["count"]), tensors["mean"], tensors["m2"], tokens)
