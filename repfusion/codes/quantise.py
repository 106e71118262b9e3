"""Vectors -> the nearest of a codebook (SimVQ, arXiv 2411.02038): the codebook is a frozen random base times
a learned linear map, so that every code moves with every other and none dies.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

DISTANCES_AT_ONCE = 1 << 24
"""Distances that are in memory at a time: 64 MiB."""
COMMITMENT = 0.25
"""Weight of the loss that pulls vectors to their codes, beside that which pulls codes to their vectors
(VQ-VAE, arXiv 1711.00937, equation 3, and its section 3.2).
"""


class Quantised(NamedTuple):
    """What vectors became."""

    vectors: Float[Tensor, "b n d"]
    """The codes' own, through which gradients pass to what was quantised (straight-through)."""
    ids: Int[Tensor, "b n"]
    loss: Float[Tensor, ""]
    """Codebook and commitment loss, a mean over all numbers."""


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on a device, for the length of a block; meta, where work is counted, has none anyway."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class SimVQ(nn.Module):
    """A codebook of `num_codes` vectors of `width` channels. It computes in float32 whatever the autocast:
    the nearest of many codes is not told in bfloat16.
    """

    def __init__(self, num_codes: int, width: int):
        super().__init__()
        self.num_codes, self.width = num_codes, width
        self.register_buffer("base", torch.randn(num_codes, width) * width**-0.5)
        self.map = nn.Linear(width, width)

    def codebook(self) -> Float[Tensor, "k d"]:
        """All codes as they are now."""
        with exact(self.base.device):
            return self.map(self.base)

    def look_up(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The vectors of codes, of which each is within the codebook."""
        with exact(self.base.device):
            return self.map(F.embedding(ids, self.base))

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "b n d"]) -> Int[Tensor, "b n"]:
        """The code of the least Euclidean distance to each vector; of several, the first."""
        rows = vectors.float().flatten(0, 1)
        with exact(self.base.device):
            codebook = self.codebook()
            lengths = codebook.square().sum(dim=1)
            parts = rows.split(max(1, DISTANCES_AT_ONCE // self.num_codes))
            found = [(lengths - 2 * part @ codebook.T).argmin(dim=1) for part in parts]
        return torch.cat(found).view(vectors.shape[:2])

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantised:
        """Each vector's nearest code, and the losses of both sides."""
        vectors = vectors.float()
        ids = self.nearest(vectors)
        codes = self.look_up(ids)
        loss = F.mse_loss(codes, vectors.detach()) + COMMITMENT * F.mse_loss(vectors, codes.detach())
        return Quantised(vectors + (codes - vectors).detach(), ids, loss)
