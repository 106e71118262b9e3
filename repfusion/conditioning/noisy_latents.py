"""RepFusion (arXiv 2606.14700): the frozen causal LLM reads the prompt, then P(z_t + e_t); its outputs there
are the condition.

P is the MLLM's own projector, fine-tuned, that reads latents for hidden states; e_t is a learned embedding of
the noise level. Gradients pass through the frozen LLM to P. The paper's ablations train the LLM too: then
with a caption loss and bidirectional attention among the noisy visual tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from repfusion.conditioning.base import (
    Condition,
    Conditioner,
    Context,
    Interface,
    Losses,
    MethodConfig,
    Prepared,
    conditioning_prompts,
)
from repfusion.conditioning.captioning import CaptioningConfig, caption_batch, caption_losses
from repfusion.conditioning.lap import LapSettings
from repfusion.inputs import Inputs
from repfusion.layers import TimestepEmbedder
from repfusion.llm.base import LAST, LanguageModel
from repfusion.llm.projector import Projector
from repfusion.request import Branch, Request


class NoisyLatentsConfig(MethodConfig):
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
    lap: LapSettings | None = None
    """Pooling of several layers in the place of the last one's states: UniFusion's LAP on RepFusion's
    condition, which neither paper tried; None takes the last layer's.
    """

    @model_validator(mode="after")
    def _parts_fit(self) -> "NoisyLatentsConfig":
        if self.captioning is not None and not self.train_llm:
            raise ValueError("captioning trains the LLM: it needs train_llm: true")
        return self

    @property
    def trains_llm(self) -> bool:
        """Whether the LLM is trained, as the setting says."""
        return self.train_llm

    @property
    def needs_head(self) -> bool:
        """Whether captions are learned."""
        return self.captioning is not None

    def tokens_beside(self, num_latents: int) -> int:
        """The noisy latents."""
        return num_latents


class NoisyLatentConditioner(Conditioner):
    """The LLM's outputs at the noisy latents after the prompt.

    Prompt and latent tokens share the context: the MLLM takes prompts that leave room for `num_tokens`.

    Raises: ValueError: where the MLLM takes no latents, its projector takes another width than they have, or
        its context is too short for them.
    """

    fixed = ("projector.scale", "projector.shift")

    def __init__(
        self,
        llm: LanguageModel,
        latent_dim: int,
        num_tokens: int,
        config: NoisyLatentsConfig = NoisyLatentsConfig(),
    ):
        super().__init__()
        if not llm.takes_latents:
            raise ValueError(
                f"MLLM {llm.folder}: a {type(llm).__name__}, whose way from its tower into the language "
                "model takes no latents; for noisy latents use a LLaVA or a causal language model, or take "
                "method 'lap', 'text_embed' or 'queries'"
            )
        self.llm = llm
        self.bidirectional = config.bidirectional
        self.captioning = config.captioning
        if config.interface == "adaln":
            self.aligned_width = llm.width
        else:
            self.context_widths = (llm.width,)
        self.projector = llm.projector or Projector(latent_dim, llm.width)
        if self.projector.linear_1.in_features != latent_dim:
            took = self.projector.linear_1.in_features
            raise ValueError(
                f"MLLM {llm.folder}: its projector takes width {took}, the latents have {latent_dim}; "
                "use the vision tower this MLLM was trained with as encoder (encoder.path), or another MLLM "
                "(mllm)"
            )
        llm.leave_room(config.tokens_beside(num_tokens))
        llm.projector = None  # one owner: the trained copy
        self.time = TimestepEmbedder(latent_dim, zero_init=True)
        self.taps, self.lap = LAST, None
        if config.lap is not None:
            self.taps, self.lap = config.lap.taps_of(len(llm.layers)), config.lap.pooling(llm)
        if config.train_llm:
            llm.unfreeze()

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompt tokens; with a caption loss in training, what is to be said of some samples, whether their
        prompt was dropped or not.
        """
        inputs: Inputs = {"prefix": self.llm.tokenise(conditioning_prompts(requests, branches))}
        if self.captioning is not None and seeds is not None:
            captions = [one.prompt for one in requests]
            self.llm.check_lengths(captions)  # also of those whose prompt was dropped
            inputs["captions"] = caption_batch(self.llm, captions, seeds, self.captioning)
        return inputs

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """The prompts, to be read on from; with `reuse`, the LLM reads them once and keeps them for every
        step.
        """
        prefix = inputs["prefix"]
        return Prepared(self.llm.remember(prefix) if reuse else prefix)

    def project(self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Float[Tensor, "b n c"]:
        """P(z_t + e_t): both are latents, and P's reading of latents applies to their sum."""
        return self.projector(z_t + self.time(t)[:, None])

    def condition(self, prepared: Prepared, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The LLM's last hidden states at the n visual positions."""
        assert prepared.prefix is not None
        visual = self.project(z_t, t)
        states, *others = self.llm.read_on_layers(prepared.prefix, visual, self.taps, self.bidirectional)
        if self.lap is not None:
            states = self.lap([states, *others])
        return Condition(states) if self.aligned_width else Condition(contexts=(Context(states),))

    def losses(self, inputs: Inputs, latents: Float[Tensor, "b n d"]) -> Losses:
        """What the LLM would say of clean latents against the captions, weighted; 0 for samples that are not
        captioned.
        """
        if (captions := inputs.get("captions")) is None:
            return {}
        shown = latents[captions.rows]
        visual = self.project(shown, shown.new_zeros(len(shown)))
        said = captions.weights * caption_losses(self.llm, visual, captions, self.bidirectional)
        return {"caption": torch.zeros_like(latents[:, 0, 0]).index_add(0, captions.rows, said)}
