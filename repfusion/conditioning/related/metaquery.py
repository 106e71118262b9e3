"""MetaQuery (arXiv 2504.06256): learned queries in a frozen MLLM, read between a begin- and an end-of-image
token, a deep bidirectional connector and a projection to the width of the generator's text encoder.

Faithful (paper and public code) are the causal reading of begin-of-image token and queries after the prompt,
the last state after the final norm, the connector (pre-norm blocks of the LLM's width, heads of 64 channels,
rotary positions, normalised queries and keys, an inner width of four times the outer in SwiGLU, an RMSNorm),
the projection after it (Linear, GELU, Linear, RMSNorm whose gain is set at first, sqrt(5.5) for SANA), and
that the generator trains too. The end-of-image token is left out: nothing that is read sees it. Ours are the
queries' first values, and that attention in the connector has no bias.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    ContextInterface,
    MethodConfig,
    Prepared,
    conditioning_prompts,
)
from repfusion.inputs import Inputs
from repfusion.layers import EncoderBlock, RMSNorm, rotary_1d
from repfusion.llm.base import LanguageModel
from repfusion.request import Branch, Request

HEAD_WIDTH = 64
MLP_RATIO = 6.0
"""A SwiGLU of inner width 4 x the outer: `mlp_ratio` counts two thirds of it."""


class MetaQueryConfig(MethodConfig):
    method: Literal["metaquery"] = "metaquery"
    """Learned queries and a bidirectional connector, the same at every step."""
    num_queries: int = Field(default=256, ge=1)
    """Queries: 64 or 256 in the paper."""
    connector_depth: int = Field(default=24, ge=0)
    """Bidirectional blocks after the language model."""
    width: int | None = Field(default=None, ge=1)
    """Channels of the projected tokens, those of the generator's text encoder (SANA: 2304); None is the
    language model's width.
    """
    gain: float = Field(default=1.0, gt=0)
    """Gain of the last RMSNorm at first: the root mean square of what the generator's text encoder gives
    (SANA: sqrt(5.5) = 2.345).
    """
    interface: ContextInterface = "cross_attention"
    """How the DiT takes the tokens."""

    def tokens_beside(self, num_latents: int) -> int:
        """The begin-of-image token and the queries."""
        return 1 + self.num_queries


class QueryConnector(nn.Module):
    """States at the queries -> tokens of `width` channels, whose root mean square is `gain` at first."""

    rotary: Tensor

    def __init__(self, llm_width: int, num_queries: int, depth: int, width: int, gain: float):
        super().__init__()
        num_heads = max(1, llm_width // HEAD_WIDTH)
        self.blocks = nn.ModuleList(EncoderBlock(llm_width, num_heads, MLP_RATIO) for _ in range(depth))
        self.norm = RMSNorm(llm_width, eps=1e-6)
        self.project = nn.Sequential(
            nn.Linear(llm_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.out_norm = RMSNorm(width, eps=1e-5)
        nn.init.constant_(self.out_norm.weight, gain)
        self.register_buffer("rotary", rotary_1d(num_queries, llm_width // num_heads), persistent=False)

    def forward(self, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b q w"]:
        for block in self.blocks:
            x = block(x, rotary=self.rotary)
        return self.out_norm(self.project(self.norm(x)))


class MetaQueryConditioner(Conditioner):
    """The connected states at the queries, as the one context of all steps.

    Raises: ValueError: where the MLLM's context is too short for the queries.
    """

    def __init__(self, llm: LanguageModel, config: MetaQueryConfig = MetaQueryConfig()):
        super().__init__()
        self.llm = llm
        llm.projector = None  # visual, so of no use here; left in, it would count as trainable
        llm.leave_room(config.tokens_beside(0))
        width = config.width or llm.width
        self.context_widths = (width,)
        self.begin = nn.Parameter(torch.randn(1, llm.width) * llm.width**-0.5)
        self.queries = nn.Parameter(torch.randn(config.num_queries, llm.width) * llm.width**-0.5)
        self.connector = QueryConnector(
            llm.width, config.num_queries, config.connector_depth, width, config.gain
        )

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompt tokens."""
        return {"prefix": self.llm.tokenise(conditioning_prompts(requests, branches))}

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Connected states; `reuse` changes nothing: they are static."""
        prefix = inputs["prefix"]
        asked = torch.cat([self.begin, self.queries]).expand(len(prefix.ids), -1, -1)
        states = self.llm.read_on(prefix, asked)[:, 1:]
        return Prepared(static=(Context(self.connector(states.to(self.queries.dtype))),))
