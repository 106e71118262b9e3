"""UniFusion's layerwise attention pooling (LAP, arXiv 2510.12789): hidden states of several layers of the
frozen language model, attended over the layer axis, pooled into one token each and refined over the tokens,
condition the DiT.

What the paper leaves open follows Krea 2's public LAP: pre-norm blocks, no positions on the layer axis, one
weight a tap.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from repfusion.conditioning.base import Conditioner, Context, ContextInterface, MethodConfig, Prepared
from repfusion.conditioning.fusions.taps import HEAD_WIDTH, TapsConditioner, TokenRefiner, check_taps
from repfusion.config import Config
from repfusion.inputs import Inputs
from repfusion.layers import EncoderBlock, RMSNorm
from repfusion.llm.base import LanguageModel


class LapSettings(Config):
    """Which hidden states are pooled, and by how many blocks."""

    taps: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Hidden states that are read, as transformers counts them: 0 are the embeddings, 1 the first layer's, -1
    the last layer's after the final norm. None is every `every`-th layer.
    """
    every: int = Field(default=3, ge=1)
    """Distance of the taps where `taps` is None: 1 + every, 1 + 2 every, ..., the paper's 4, 7, ..., 31."""
    layer_depth: int = Field(default=2, ge=0)
    """Transformer blocks over the layer axis, a token at a time."""
    refiner_depth: int = Field(default=2, ge=0)
    """Bidirectional transformer blocks over the tokens, after pooling."""

    @model_validator(mode="after")
    def _taps_differ(self) -> "LapSettings":
        if self.taps is not None and len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps {self.taps} name a layer twice")
        return self

    def taps_of(self, num_layers: int) -> tuple[int, ...]:
        """The taps of a language model of so many layers.

        Raises:
            ValueError: a tap lies beyond its layers, or it has too few for `every`.
        """
        if self.taps is None:
            found = tuple(range(1 + self.every, num_layers + 1, self.every))
            if not found:
                raise ValueError(
                    f"LAP's every is {self.every}, the language model has {num_layers} layers: no tap; lower "
                    "it, or name taps"
                )
            return found
        check_taps(self.taps, num_layers, "LAP's taps name")
        return self.taps

    def pooling(self, llm: LanguageModel) -> "LayerwisePooling":
        """Fresh layers for a language model. Raises ValueError as `taps_of` does."""
        num_taps = len(self.taps_of(len(llm.layers)))
        return LayerwisePooling(llm.width, num_taps, self.layer_depth, self.refiner_depth)


class LapConfig(MethodConfig):
    method: Literal["lap"] = "lap"
    """The prompt's states of several layers, pooled: UniFusion's fusion, the same at every step."""
    interface: ContextInterface = "in_context"
    """How the DiT takes the pooled tokens."""
    lap: LapSettings = LapSettings()
    """What is pooled."""


class LayerwisePooling(nn.Module):
    """States of several layers -> one token in the place of each.

    Blocks over the layer axis let a token's states see each other; a weight for each tap, an average at
    first, pools them; blocks over the tokens then undo what causal reading has hidden from the early ones.
    """

    def __init__(self, width: int, num_taps: int, layer_depth: int = 2, refiner_depth: int = 2):
        super().__init__()
        num_heads = max(1, width // HEAD_WIDTH)
        self.tap_norms = nn.ModuleList(RMSNorm(width, eps=1e-6) for _ in range(num_taps))
        self.layer_blocks = nn.ModuleList(EncoderBlock(width, num_heads) for _ in range(layer_depth))
        self.pool = nn.Parameter(torch.full((num_taps,), 1 / num_taps))
        self.refiner = TokenRefiner(width, refiner_depth)
        self.kept: tuple[int, ...] | None = None
        """Places of the taps that are pooled; None is all, as in training. Those left out are not seen and
        add nothing; the weights of the others stay.
        """

    def forward(
        self, states: Sequence[Float[Tensor, "b m c"]], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b m c"]:
        """States of the taps, in their order; `mask` marks the real tokens, None means all."""
        normed = [norm(state) for norm, state in zip(self.tap_norms, states, strict=True)]
        pool = self.pool
        if self.kept is not None:
            normed, pool = [normed[place] for place in self.kept], pool[list(self.kept)]
        x = rearrange(torch.stack(normed, dim=2), "b m k c -> (b m) k c")
        for block in self.layer_blocks:
            x = block(x)
        x = rearrange(x, "(b m) k c -> b m k c", b=len(states[0]))
        x = torch.einsum("bmkc,k->bmc", x, pool.to(x.dtype))
        return self.refiner(x, mask)


class LapConditioner(TapsConditioner):
    """The prompt's pooled states, as the one context of all steps."""

    def __init__(self, llm: LanguageModel, config: LapConfig = LapConfig()):
        super().__init__(llm, config.lap.taps_of(len(llm.layers)))
        self.context_widths = (llm.width,)
        self.lap = config.lap.pooling(llm)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Pooled states, real tokens first; `reuse` changes nothing: they are static."""
        states = self.contexts(inputs["prefix"])
        mask = states[0].mask
        return Prepared(static=(Context(self.lap([one.tokens for one in states], mask), mask),))


def drop_taps(conditioner: Conditioner, dropped: Sequence[int]) -> None:
    """Leaves taps of a trained LAP out from now on, whose numbers are as the method names them: what a layer
    contributes shows in what is missing without it.

    Raises:
        ValueError: the method pools no layers, has no such tap, or none would be left.
    """
    poolings = [one for one in conditioner.children() if isinstance(one, LayerwisePooling)]
    if not poolings:
        raise ValueError(
            "dropped_taps: the checkpoint's method pools no layers; expected lap, or noisy_latents with lap, "
            "or unifusion"
        )
    taps = getattr(conditioner, "taps", ())
    if unknown := [tap for tap in dropped if tap not in taps]:
        raise ValueError(f"dropped_taps name {unknown}; the checkpoint's LAP has the taps {list(taps)}")
    kept = tuple(place for place, tap in enumerate(taps) if tap not in dropped)
    if not kept:
        raise ValueError(f"dropped_taps name all taps {list(taps)}; leave one")
    for pooling in poolings:
        pooling.kept = kept
