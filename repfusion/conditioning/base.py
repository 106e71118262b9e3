"""What every conditioning method is: requests -> inputs -> prepared -> a condition at every denoising
step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.data.readers import Reader
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request

Losses = dict[str, Float[Tensor, " b"]]
"""Weighted losses by name, one a sample and 0 where a sample has none. The first is reported as `loss`; the
sum of their means is minimised.
"""


Interface = Literal["adaln", "cross_attention"]
"""How a denoiser takes a method's outputs: aligned with the latent tokens, or as a context."""
ContextInterface = Literal["cross_attention", "in_context"]
"""How a denoiser takes a context: it attends to it in every block, or has it in its own sequence."""


@dataclass(frozen=True)
class Handover:
    """What a training takes of a checkpoint of another model; the rest of either stays out."""

    weights: tuple[str, ...]
    """How the names of the weights begin."""
    mllm: str = "mllm"
    """The part (`ModelConfig.parts`) that has to be the checkpoint's language model."""


class MethodConfig(Config):
    """The settings of a conditioning method, which has its name as `method`, and what the model has to know
    of it before it is built.
    """

    reads_images: ClassVar[bool] = False
    """Whether requests may have images, for which the language model is loaded with its eyes."""
    has_dit: ClassVar[bool] = True
    """Whether a DiT denoises; else the method brings a denoiser of its own."""

    @property
    def columns(self) -> Mapping[str, Reader]:
        """How the columns are read that the method can use beside captions, by name; their values come in
        `Request.computed`.
        """
        return {}

    @property
    def is_in_context(self) -> bool:
        """Whether the denoiser has the method's context in its own sequence."""
        return getattr(self, "interface", None) == "in_context"

    @property
    def second_llm(self) -> Path | None:
        """Folder of a second language model that the method reads prompts with: its setting `second`."""
        return getattr(self, "second", None)

    @property
    def trains_llm(self) -> bool:
        """Whether the language model is trained, so that its weights are the masters."""
        return False

    @property
    def needs_head(self) -> bool:
        """Whether the language model's head is needed, which scores the next token."""
        return False

    @property
    def needs_start(self) -> bool:
        """Whether a training has to start from a checkpoint, which holds what the method keeps frozen."""
        return False

    def tokens_beside(self, num_latents: int) -> int:
        """Tokens that the language model reads after a prompt, where the latents have `num_latents`."""
        return 0

    def handover(self, before: "MethodConfig") -> Handover | None:
        """What a training takes of a checkpoint of the method `before`; None is all of it, of a model that
        has to be the same. Raises ValueError where weights that fit would mean something else.
        """
        return None


@dataclass(frozen=True)
class Context:
    """Tokens [b, m, c] that a denoiser attends to; `mask` marks the real ones, None means all."""

    tokens: Float[Tensor, "b m c"]
    mask: Bool[Tensor, "b m"] | None = None
    positions: Int[Tensor, "b m _"] | None = None
    """Row and column of each token, for a denoiser whose attention has places; of clips with the frame before
    them or without. Columns from 0 on count from the place after the latents' grid, where text runs along
    the diagonal: (0, 0), (1, 1), ...; negative ones are left of the grid, in its rows, where images stand.
    None is text in order, padding included.
    """

    def first(self, num: int) -> "Context":
        """The context of the first `num` rows."""
        rows = (None if one is None else one[:num] for one in (self.mask, self.positions))
        return Context(self.tokens[:num], *rows)


@dataclass(frozen=True)
class Condition:
    """What changes from step to step: one token [b, n, c] a latent token, for AdaLN; contexts."""

    aligned: Float[Tensor, "b n c"] | None = None
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What no step changes: the prompts as the language model reads on from them, aligned tokens,
    contexts.
    """

    prefix: Prefix | None = None
    aligned: Float[Tensor, "b n c"] | None = None
    static: tuple[Context, ...] = ()
    """Contexts whose keys and values the denoiser computes once."""
    states: tuple[Context, ...] = ()
    """What the conditioner itself reads on from at every step; it never reaches the denoiser as it is."""

    def first(self, num: int) -> "Prepared":
        """What was prepared of the first `num` requests."""
        prefix = None if self.prefix is None else self.prefix.first(num)
        aligned = None if self.aligned is None else self.aligned[:num]
        static, states = (
            tuple(context.first(num) for context in kept) for kept in (self.static, self.states)
        )
        return Prepared(prefix, aligned, static, states)


class Conditioner(nn.Module):
    """Requests -> the condition of a denoiser. It holds the language model and what it trains beside it.

    In training every trained module runs in every micro-batch, at weight 0 where there is nothing: under ZeRO
    all ranks have to run the same modules.
    """

    aligned_width: int | None = None
    """Channels of aligned tokens; None where the method gives none."""
    context_widths: tuple[int, ...] = ()
    """Channels of the contexts, static ones first. A denoiser is built for exactly these, or refuses."""
    llm: LanguageModel
    fixed: tuple[str, ...] = ()
    """Names of buffers, of the latents' shape, without which the trained weights mean something else."""
    adapters: tuple[str, ...] = ()
    """Names of parameters that it adds within a language model, whose folder does not hold them."""
    array_shapes: Mapping[str, tuple[int, int]] = {}
    """Shapes of arrays that it reads of samples rather than of captions, by their columns."""

    @property
    def language_models(self) -> tuple[LanguageModel, ...]:
        """The language models that it holds, `llm` first."""
        return (self.llm,)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Requests -> inputs on the CPU, without weights: this runs in the thread that reads ahead.

        Args:
            requests: what is asked for.
            branches: how much of each request conditions.
            seeds: a sample's 64 bits each, which decide all randomness of training; None in sampling.
        """
        raise NotImplementedError

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Inputs, on the model's device -> what no step changes. In training it runs within the forward pass;
        with `reuse`, for many steps without gradients, keys and values of the prompts are kept.
        """
        raise NotImplementedError

    def condition(self, prepared: Prepared, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The condition at noise level t."""
        return Condition(aligned=prepared.aligned)

    def losses(self, inputs: Inputs, latents: Float[Tensor, "b n d"]) -> Losses:
        """Auxiliary losses of a training batch, of its clean latents."""
        return {}


@contextmanager
def frozen_reading(device: torch.device) -> Iterator[None]:
    """What no step changes is read without gradients, in the precision of the language model's weights."""
    autocast = nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast:  # meta has none: there work is counted and not done
        yield


def conditioning_prompts(requests: Sequence[Request], branches: Sequence[Branch]) -> list[str]:
    """The prompts as they condition: an empty one for the branch `none`."""
    return [one.prompt if branch == "full" else "" for one, branch in zip(requests, branches, strict=True)]
