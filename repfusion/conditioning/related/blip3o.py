"""BLIP3-o (arXiv 2505.09568): learned queries in a frozen MLLM, a projector, and a DiT that flow-matches
vision features, from which a decoder makes the pixels.

Faithful (paper and public code) are queries that begin as unit Gaussian noise and are read causally after the
prompt, the last state after the final norm, that nothing but a projector lies between it and the DiT's
cross-attention, and rectified flow on the features of a vision tower: the latents of this code base. Ours are
the projector's form (Linear, GELU, Linear, as LLaVA's), features that are not pooled to 64 tokens, and the
RAE decoder in the place of a diffusion model that draws from them.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from repfusion.conditioning.base import MethodConfig
from repfusion.conditioning.queries import QueriesConditioner, QueriesConfig
from repfusion.llm.base import LanguageModel


class Blip3oConfig(MethodConfig):
    method: Literal["blip3o"] = "blip3o"
    """Learned queries behind a projector, the same at every step."""
    num_queries: int = Field(default=64, ge=1)
    """Queries."""
    width: int | None = Field(default=None, ge=1)
    """Channels of the projected tokens; None is the language model's width."""

    def tokens_beside(self, num_latents: int) -> int:
        """The queries."""
        return self.num_queries


class Blip3oConditioner(QueriesConditioner):
    """The projected states at the queries, as the one context of all steps.

    Raises: ValueError: where the MLLM's context is too short for the queries.
    """

    def __init__(self, llm: LanguageModel, config: Blip3oConfig = Blip3oConfig()):
        queries = QueriesConfig(interface="cross_attention", num_queries=config.num_queries)
        super().__init__(llm, config.num_queries, queries)
        nn.init.normal_(self.queries)
        width = config.width or llm.width
        self.context_widths = (width,)
        self.connector = nn.Sequential(nn.Linear(llm.width, width), nn.GELU(), nn.Linear(width, width))
