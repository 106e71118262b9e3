"""Transfusion (arXiv 2408.11039), a baseline of RepFusion: the LLM itself denoises. It reads the prompt, then
P(z_t + e_t), bidirectional among those, and a linear head turns its outputs into the velocity: no DiT. The
LLM is trained, on captions of clean latents as well.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from repfusion.conditioning.captioning import CaptioningConfig
from repfusion.conditioning.noisy_latents import NoisyLatentsConfig
from repfusion.config import Config
from repfusion.model.dit import RMSNorm


class TransfusionConfig(Config):
    method: Literal["transfusion"] = "transfusion"
    """The LLM itself denoises."""
    captioning: CaptioningConfig | None = CaptioningConfig()
    """The interleaved caption loss; None leaves it out."""

    def reading(self) -> NoisyLatentsConfig:
        """How the LLM reads prompt and noisy latents."""
        return NoisyLatentsConfig(train_llm=True, bidirectional=True, captioning=self.captioning)


class VelocityHead(nn.Module):
    """In the place of a DiT: the LLM's outputs -> velocity; zero at first, as a DiT's."""

    def __init__(self, condition_dim: int, latent_dim: int):
        super().__init__()
        self.norm = RMSNorm(condition_dim, eps=1e-6)
        self.out = nn.Linear(condition_dim, latent_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        z_t: Float[Tensor, "b n d"],
        t: Float[Tensor, " b"],
        condition: Float[Tensor, "b n c"],
        mask: None = None,
    ) -> Float[Tensor, "b n d"]:
        """Neither z_t nor t enters but through the condition."""
        return self.out(self.norm(condition))
