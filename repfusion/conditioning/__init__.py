"""(prompts, noisy latents, noise level) -> condition tokens for the DiT: one file a method.

A conditioner holds the MLLM and whatever it trains. Its `condition` is called at every denoising step with
what `prepare` made of the prompts once.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Tokens `[b, m, c]`; `mask` marks the real ones, None means all."""

    tokens: Float[Tensor, "b m c"]
    mask: Bool[Tensor, "b m"] | None = None
