"""RepFusion (arXiv 2606.14700): the frozen causal LLM reads the prompt, then P(z_t + e_t); its outputs there
are the condition.

P is the MLLM's own projector, fine-tuned; e_t is a learned embedding of the noise level. Gradients pass
through the frozen LLM to P. The paper's ablations train the LLM too: then with a caption loss and
bidirectional attention among the noisy visual tokens.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from repfusion.conditioning import Condition
from repfusion.conditioning.captioning import CaptionBatch, CaptioningConfig, caption_losses
from repfusion.config import Config
from repfusion.llm.mllm import MLLM, Projector
from repfusion.llm.prefix import Prefix, leave_room, read_on, read_prompts
from repfusion.model.dit import Interface, TimestepEmbedder


class NoisyLatentsConfig(Config):
    method: Literal["noisy_latents"] = "noisy_latents"
    """The MLLM reads prompt and noisy latents at every step: RepFusion."""
    interface: Interface = "adaln"
    """How the DiT takes the outputs; the paper finds parity."""
    train_llm: bool = False
    """Train the LLM too (an ablation; RepFusion keeps it frozen)."""
    bidirectional: bool = False
    """Whether noisy visual tokens see all of each other; off in RepFusion, on in its trained-LLM variant."""
    captioning: CaptioningConfig | None = None
    """The caption loss of the trained LLM; None leaves it out."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "NoisyLatentsConfig":
        if self.captioning is not None and not self.train_llm:
            raise ValueError("captioning trains the LLM: it needs train_llm: true")
        return self


class NoisyLatentConditioner(nn.Module):
    prompt_column: Literal["ids", "features"] = "ids"

    def __init__(
        self, mllm: MLLM, latent_dim: int, num_tokens: int, config: NoisyLatentsConfig = NoisyLatentsConfig()
    ):
        """Prompt and latent tokens share the context: the MLLM takes prompts that leave room for
        `num_tokens`.

        Raises:
            ValueError: where the MLLM's projector takes another width than the latents have, or its context
            is too short for them.
        """
        super().__init__()
        self.mllm = mllm
        self.interface: Interface = config.interface
        self.bidirectional = config.bidirectional
        self.projector = mllm.projector or Projector(latent_dim, mllm.width)
        if self.projector.linear_1.in_features != latent_dim:
            took = self.projector.linear_1.in_features
            raise ValueError(
                f"MLLM {mllm.folder}: its projector takes width {took}, the latents have {latent_dim}; "
                "use the vision tower this MLLM was trained with as encoder"
            )
        leave_room(mllm, num_tokens)
        mllm.projector = None  # one owner: the trained copy
        self.time = TimestepEmbedder(latent_dim, zero_init=True)
        if config.train_llm:
            mllm.unfreeze()

    def prepare(self, prompts: list[str], device: torch.device, reuse: bool = False) -> Prefix:
        """Prompts -> prefix. With `reuse`, the LLM reads the prefix once and keeps it for every step (no
        gradients).
        """
        return read_prompts(self.mllm, prompts, device, reuse)

    def project(self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Float[Tensor, "b n c"]:
        """P(z_t + e_t)."""
        return self.projector(z_t + self.time(t)[:, None])

    def condition(self, prefix: Prefix, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The LLM's last hidden states at the n visual positions."""
        return Condition(read_on(self.mllm, prefix, self.project(z_t, t), self.bidirectional))

    def caption_losses(self, latents: Float[Tensor, "r n d"], captions: CaptionBatch) -> Float[Tensor, " r"]:
        """Of clean latents, unweighted: what the LLM would say of them."""
        visual = self.project(latents, latents.new_zeros(len(latents)))
        return caption_losses(self.mllm, visual, captions, self.bidirectional)
