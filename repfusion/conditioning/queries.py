"""Learnable queries (MetaQuery, arXiv 2504.06256), a baseline of RepFusion: the frozen LLM reads the prompt,
then N learned tokens in the place of the noisy latents; its outputs there are the condition.

Static queries see neither z_t nor t: they are read once per image. Timestep queries add an embedding of the
noise level to the queries and are read again at every step.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning import Condition
from repfusion.config import Config
from repfusion.llm.mllm import MLLM
from repfusion.llm.prefix import Prefix, leave_room, read_on, read_prompts
from repfusion.model.dit import Attention, Interface, RMSNorm, SwiGLU, TimestepEmbedder

CONNECTOR_HEAD_WIDTH = 64


class QueriesConfig(Config):
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


@dataclass(frozen=True)
class QueryPrompts:
    """Prompts; of static queries in sampling, the condition too."""

    prefix: Prefix
    condition: Float[Tensor, "b q c"] | None = None

    def first(self, num: int) -> "QueryPrompts":
        """Of the first `num` prompts."""
        return QueryPrompts(self.prefix.first(num), None if self.condition is None else self.condition[:num])


class ConnectorLayer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_ratio=4.0)

    def forward(self, x: Float[Tensor, "b q c"]) -> Float[Tensor, "b q c"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Connector(nn.Sequential):
    """MetaQuery's: `depth` bidirectional layers of the LLM's width and an RMSNorm with gain."""

    def __init__(self, width: int, depth: int):
        num_heads = max(1, width // CONNECTOR_HEAD_WIDTH)
        layers = (ConnectorLayer(width, num_heads) for _ in range(depth))
        super().__init__(*layers, RMSNorm(width, eps=1e-6))


class QueriesConditioner(nn.Module):
    prompt_column: Literal["ids", "features"] = "ids"

    def __init__(self, mllm: MLLM, num_tokens: int, config: QueriesConfig = QueriesConfig()):
        """Raises ValueError where adaln meets another number of queries than `num_tokens`, or the MLLM's
        context is too short for them.
        """
        super().__init__()
        num_queries = config.num_queries or num_tokens
        if config.interface == "adaln" and num_queries != num_tokens:
            raise ValueError(
                f"conditioning.num_queries is {num_queries}, the latents are {num_tokens} tokens: interface "
                "adaln pairs them; leave num_queries out, or set interface: cross_attention"
            )
        self.mllm = mllm
        mllm.projector = None  # visual, so of no use here; left in, it would count as trainable
        leave_room(mllm, num_queries)
        self.interface: Interface = config.interface
        self.queries = nn.Parameter(torch.randn(num_queries, mllm.width) * mllm.width**-0.5)
        self.time = TimestepEmbedder(mllm.width, zero_init=True) if config.reads_time else None
        self.connector = Connector(mllm.width, config.connector_depth) if config.connector_depth else None

    def prepare(self, prompts: list[str], device: torch.device, reuse: bool = False) -> QueryPrompts:
        """With `reuse`, the LLM reads the prompts once; static queries are read then, for all steps (no
        gradients).
        """
        prefix = read_prompts(self.mllm, prompts, device, reuse)
        if not reuse or self.time is not None:
            return QueryPrompts(prefix)
        with torch.no_grad():
            return QueryPrompts(prefix, self._read(prefix, None))

    def condition(
        self, prompts: QueryPrompts, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]
    ) -> Condition:
        """The LLM's last hidden states at the queries; z_t does not enter."""
        read = self._read(prompts.prefix, t) if prompts.condition is None else prompts.condition
        return Condition(read)

    def _read(self, prefix: Prefix, t: Float[Tensor, " b"] | None) -> Float[Tensor, "b q c"]:
        queries = self.queries.expand(len(prefix.ids), -1, -1)
        if self.time is not None:
            assert t is not None
            queries = queries + self.time(t)[:, None]
        hidden = read_on(self.mllm, prefix, queries)
        return hidden if self.connector is None else self.connector(hidden)
