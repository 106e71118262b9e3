"""Transfusion (arXiv 2408.11039), a baseline of RepFusion: the LLM itself denoises. It reads the prompt, then
P(z_t + e_t), bidirectional among those, and a linear head turns its outputs into the velocity: no DiT. The
LLM is trained, on captions of clean latents as well.
"""

from typing import ClassVar, Literal

from repfusion.conditioning.base import MethodConfig
from repfusion.conditioning.captioning import CaptioningConfig
from repfusion.conditioning.noisy_latents import NoisyLatentsConfig


class TransfusionConfig(MethodConfig):
    has_dit: ClassVar[bool] = False
    method: Literal["transfusion"] = "transfusion"
    """The LLM itself denoises."""
    captioning: CaptioningConfig | None = CaptioningConfig()
    """The interleaved caption loss; None leaves it out."""

    @property
    def trains_llm(self) -> bool:
        """Always: the LLM is what denoises."""
        return True

    @property
    def needs_head(self) -> bool:
        """Whether captions are learned."""
        return self.captioning is not None

    def tokens_beside(self, num_latents: int) -> int:
        """The noisy latents."""
        return num_latents

    def reading(self) -> NoisyLatentsConfig:
        """How the LLM reads prompt and noisy latents."""
        return NoisyLatentsConfig(train_llm=True, bidirectional=True, captioning=self.captioning)
