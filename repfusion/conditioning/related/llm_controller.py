"""A decoder-only language model as a controller (LLMDiff-Adapter, arXiv 2502.04412): what context adds to
every token, layer by layer, is summed and joins a frozen text-conditioned DiT by a second cross-attention.

Faithful (paper) is c = c_T + sum over layers t of g(t) * (S(x | context) - S(x | token alone)) + sqrt(2 h(t))
* eps_t, where S is a layer's update of a token and "alone" is the token read without any other; that g and
h are learned, a number a layer; the mixture attn_old * a1 * e^b1 + attn_new * a2 * e^b2 in every block; plain
mean squared error; that the generator and what it reads of its own text encoder stay frozen. Ours are that
c_T is the token's embedding, an RMSNorm after the sum, that in sampling the noise is left out, and that the
last layer's update is: what transformers gives of that layer is normed.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    Handover,
    MethodConfig,
    Prepared,
    conditioning_prompts,
    frozen_reading,
)
from repfusion.conditioning.text_embed import TextEmbedConfig
from repfusion.config import WeightsFolder
from repfusion.inputs import Inputs
from repfusion.layers import RMSNorm
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request

FIRST_NOISE = -6.0
"""h(t) is softplus of this at first, 0.0025: a standard deviation of 0.07 a layer."""


class LlmControllerConfig(MethodConfig):
    method: Literal["llm_controller"] = "llm_controller"
    """What context adds to each token, summed over layers, beside a text encoder's states."""
    second: WeightsFolder | None = None
    """Folder of the generator's own text encoder, whose last states its first cross-attention reads; None is
    the language model itself.
    """
    subtracts_alone: bool = True
    """Whether a layer's update of the token alone is taken from its update in context."""
    adds_noise: bool = True
    """Whether training adds the learned noise."""
    trains_generator: bool = False
    """Whether the DiT trains too; else it is frozen, and a training starts from a text_embed's checkpoint."""

    @property
    def needs_start(self) -> bool:
        return not self.trains_generator

    def handover(self, before: MethodConfig) -> Handover | None:
        """The DiT of a text_embed, and the norm of what it reads."""
        if not isinstance(before, TextEmbedConfig):
            return None
        return Handover(
            ("denoiser.", "conditioner.norm."), "mllm" if self.second is None else "conditioning.second"
        )


class UpdateSum(nn.Module):
    """Updates of a token in context and alone, layer by layer -> what conditions.

    Args:
        width: channels of the language model.
        num_updates: layers whose update is summed.
        adds_noise: whether there is a learned noise.
    """

    def __init__(self, width: int, num_updates: int, adds_noise: bool):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(num_updates))
        self.noise = nn.Parameter(torch.full((num_updates,), FIRST_NOISE)) if adds_noise else None
        self.norm = RMSNorm(width, eps=1e-6)

    def forward(
        self,
        start: Float[Tensor, "b m c"],
        updates: Sequence[Float[Tensor, "b m c"]],
        noise: Float[Tensor, "b m c"] | None = None,
    ) -> Float[Tensor, "b m c"]:
        """The normalised sum. `noise` of unit variance stands for that of all layers, whose variances add
        up; None leaves it out.
        """
        total = start
        for gain, update in zip(self.gains, updates, strict=True):
            total = total + gain * update
        if noise is not None and self.noise is not None:
            total = total + (2 * F.softplus(self.noise).sum()).sqrt() * noise
        return self.norm(total)


class LlmControllerConditioner(Conditioner):
    """The text encoder's states, as text_embed has them, and the summed updates: two contexts of all steps.

    Args:
        llm: read without gradients.
        config: the method's settings.
        second: the generator's text encoder, where the settings name one; frozen.

    Raises: ValueError: where the language model has a single layer, of which nothing is summed.
    """

    def __init__(
        self,
        llm: LanguageModel,
        config: LlmControllerConfig = LlmControllerConfig(),
        second: LanguageModel | None = None,
    ):
        super().__init__()
        if len(llm.layers) < 2:
            raise ValueError(
                f"MLLM {llm.folder}: {len(llm.layers)} layer; llm_controller sums the updates of all layers "
                "but the last, so that it takes two or more"
            )
        self.llm, self.second = llm, second
        for one in self.language_models:
            one.projector = None  # visual, so of no use here; left in, it would count as trainable
        self.subtracts_alone = config.subtracts_alone
        encoder = self.language_models[-1]
        self.context_widths = (encoder.width, llm.width)
        self.norm = RMSNorm(encoder.width, eps=1e-6).requires_grad_(config.trains_generator)
        self.sum = UpdateSum(llm.width, len(llm.layers) - 1, config.adds_noise)

    @property
    def language_models(self) -> tuple[LanguageModel, ...]:
        """The controller, and the text encoder where it is another."""
        return (self.llm,) if self.second is None else (self.llm, self.second)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompts in each language model's tokens; in training the noise of each token, by its sample's seed
        and its place in the prompt, whatever stands beside it.
        """
        prompts = conditioning_prompts(requests, branches)
        read = [one.tokenise(prompts) for one in self.language_models]
        inputs: Inputs = {"read": read}
        if seeds is not None and self.sum.noise is not None:
            inputs["noise"] = left_padded_noise(seeds, read[0].mask, self.llm.width)
        return inputs

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Both contexts; `reuse` changes nothing: they are static."""
        prefix, encoded = inputs["read"][0], inputs["read"][-1]
        with frozen_reading(prefix.ids.device):
            start, updates = self._updates(prefix)
            if self.subtracts_alone:
                _, alone = self._updates(each_alone(prefix))
                updates = [one - by.view_as(one) for one, by in zip(updates, alone, strict=True)]
            text = wide(self.language_models[-1].read(encoded))
        found = self.sum(start, updates, inputs.get("noise"))
        return Prepared(static=(Context(self.norm(text), encoded.mask), Context(found, prefix.mask)))

    def _updates(self, prefix: Prefix) -> tuple[Float[Tensor, "b m c"], list[Float[Tensor, "b m c"]]]:
        """Embeddings, and what each layer but the last adds to them."""
        states = [*map(wide, self.llm.read_layers(prefix, range(len(self.llm.layers))))]
        return states[0], [after - before for before, after in pairwise(states)]


def wide(states: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
    """States as float32 at least."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def each_alone(prefix: Prefix) -> Prefix:
    """Every token of the prompts as a prompt of its own, padding too, which nobody looks at."""
    ids = prefix.ids.reshape(-1, 1)
    return Prefix(ids, torch.ones_like(ids, dtype=torch.bool))


def left_padded_noise(seeds: Sequence[int], mask: Bool[Tensor, "b m"], width: int) -> Float[Tensor, "b m c"]:
    """Unit noise of the real tokens of left-padded rows, on the CPU, 0 at padding: the first that a generator
    of the row's seed draws, turned by a constant, so that it is not that of the latents.
    """
    noise = torch.zeros(*mask.shape, width)
    generator = torch.Generator()
    for row, seed, length in zip(noise, seeds, mask.sum(1).tolist(), strict=True):
        generator.manual_seed((seed + 1) % 2**63)
        row[len(row) - length :].normal_(generator=generator)
    return noise
