"""Learnable queries (MetaQuery, arXiv 2504.06256), a baseline of RepFusion: the frozen LLM reads the prompt,
then N learned tokens in the place of the noisy latents; its outputs there are the condition.

Static queries see neither z_t nor t: they are read once per image. Timestep queries add an embedding of the
noise level to the queries and are read again at every step.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Condition,
    Conditioner,
    Context,
    Interface,
    MethodConfig,
    Prepared,
    conditioning_prompts,
)
from repfusion.inputs import Inputs
from repfusion.layers import EncoderBlock, RMSNorm, TimestepEmbedder
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request

CONNECTOR_HEAD_WIDTH = 64


class QueriesConfig(MethodConfig):
    method: Literal["queries"] = "queries"
    """Learned tokens take the place of the noisy latents."""
    interface: Interface = "adaln"
    """How the DiT takes the outputs; adaln needs a query for each latent token."""
    num_queries: int | None = Field(default=None, ge=1)
    """None is one for each latent token."""
    reads_time: bool = False
    """Timestep queries: the noise level is added and the LLM reads them at every step."""
    connector_depth: int = Field(default=0, ge=0)
    """Bidirectional transformer layers after the LLM, as MetaQuery's connector; 0 leaves it out."""

    def tokens_beside(self, num_latents: int) -> int:
        """The queries."""
        return self.num_queries or num_latents


class Connector(nn.Sequential):
    """MetaQuery's: `depth` bidirectional layers of the LLM's width and an RMSNorm with gain."""

    def __init__(self, width: int, depth: int):
        num_heads = max(1, width // CONNECTOR_HEAD_WIDTH)
        layers = (EncoderBlock(width, num_heads) for _ in range(depth))
        super().__init__(*layers, RMSNorm(width, eps=1e-6))


class QueriesConditioner(Conditioner):
    """The LLM's outputs at learned tokens after the prompt.

    Raises: ValueError: where adaln meets another number of queries than `num_tokens`, or the MLLM's context
        is too short for them.
    """

    def __init__(self, llm: LanguageModel, num_tokens: int, config: QueriesConfig = QueriesConfig()):
        super().__init__()
        num_queries = config.tokens_beside(num_tokens)
        if config.interface == "adaln" and num_queries != num_tokens:
            raise ValueError(
                f"conditioning.num_queries is {num_queries}, the latents are {num_tokens} tokens: interface "
                "adaln pairs them; leave num_queries out, or set interface: cross_attention"
            )
        self.llm = llm
        llm.projector = None  # visual, so of no use here; left in, it would count as trainable
        llm.leave_room(num_queries)
        if config.interface == "adaln":
            self.aligned_width = llm.width
        else:
            self.context_widths = (llm.width,)
        self.queries = nn.Parameter(torch.randn(num_queries, llm.width) * llm.width**-0.5)
        self.time = TimestepEmbedder(llm.width, zero_init=True) if config.reads_time else None
        self.connector: nn.Module | None = None
        if config.connector_depth:
            self.connector = Connector(llm.width, config.connector_depth)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompt tokens."""
        return {"prefix": self.llm.tokenise(conditioning_prompts(requests, branches))}

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Static queries are read here, once for all steps; timestep queries at every step. With `reuse`, the
        LLM reads the prompts once, and the queries after what it keeps of them.
        """
        prefix = self.llm.remember(inputs["prefix"]) if reuse else inputs["prefix"]
        if self.time is not None:
            return Prepared(prefix)
        states = self._read(prefix, None)
        return Prepared(aligned=states) if self.aligned_width else Prepared(static=(Context(states),))

    def condition(self, prepared: Prepared, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The LLM's last hidden states at the queries; z_t does not enter."""
        if self.time is None:
            return Condition(prepared.aligned)
        assert prepared.prefix is not None
        states = self._read(prepared.prefix, t)
        return Condition(states) if self.aligned_width else Condition(contexts=(Context(states),))

    def _read(self, prefix: Prefix, t: Float[Tensor, " b"] | None) -> Float[Tensor, "b q c"]:
        queries = self.queries.expand(len(prefix.ids), -1, -1)
        if self.time is not None:
            assert t is not None
            queries = queries + self.time(t)[:, None]
        hidden = self.llm.read_on(prefix, queries)
        return hidden if self.connector is None else self.connector(hidden)
