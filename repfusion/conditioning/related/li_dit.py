"""LI-DiT (arXiv 2406.11831): a frozen language model reads an instruction before the prompt; the prompt's
states in the third-to-last layer, without the instruction's, pass a refiner that the noise level gates.

Faithful are the instruction, cut off after encoding, the layer, two blocks of full attention over the tokens,
whose residuals are gated by noise level and mean text and begin at zero, so that the refiner is at first not
there, cross-attention, and that two language models can be joined by a collaborative refiner, whose branches
attend to each other. There is no public code: what the paper leaves open follows the token refiner of
HunyuanVideo (public code): LayerNorm, no shift or scale, a gate for each residual. Ours are the RMSNorm of
the states before it, SwiGLU, normalised queries and keys, where the branches attend to each other (after
each has attended to itself, gated like the rest), and that their tokens stand behind each other after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Condition,
    Conditioner,
    Context,
    MethodConfig,
    Prepared,
    conditioning_prompts,
    frozen_reading,
)
from repfusion.conditioning.fusions.taps import HEAD_WIDTH, check_taps
from repfusion.config import WeightsFolder
from repfusion.inputs import Inputs
from repfusion.layers import Attention, RMSNorm, SwiGLU, TimestepEmbedder
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request


class LiDitConfig(MethodConfig):
    method: Literal["li_dit"] = "li_dit"
    """An instructed reading of the prompt, refined anew at every noise level."""
    instruction: str = "Describe the objects of the image with their colors, shapes, numbers and places:"
    """What is read before the prompt and cut off after it; an empty one leaves it out."""
    layer: int = -3
    """The hidden state that is read, as transformers counts them: -3 is the third-to-last one."""
    refiner_depth: int = Field(default=2, ge=0)
    """Gated blocks over the tokens."""
    second: WeightsFolder | None = None
    """Folder of a second language model, joined by the collaborative refiner; None leaves it out."""

    def tokens_beside(self, num_latents: int) -> int:
        """The instruction: no tokenizer makes more tokens of it than it has bytes."""
        return len(self.instruction.encode())


class Gate(nn.Module):
    """Lets as much of a residual through, channel by channel, as the signal says: at first nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, residual: Float[Tensor, "b m c"], signal: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b m c"]:
        return self.linear(F.silu(signal))[:, None] * residual


class GatedBlock(nn.Module):
    """Attention among a branch's tokens, to those of another branch where there is one, and an MLP, each
    behind a gate of its own.
    """

    def __init__(self, width: int, has_other: bool):
        super().__init__()
        num_heads = max(1, width // HEAD_WIDTH)
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads)
        self.attention_gate = Gate(width)
        self.other_norm = nn.LayerNorm(width, eps=1e-6) if has_other else None
        self.other_attention = Attention(width, num_heads) if has_other else None
        self.other_gate = Gate(width) if has_other else None
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, mlp_ratio=4.0)
        self.mlp_gate = Gate(width)

    def attend(
        self, x: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"], signal: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b m c"]:
        """The branch's tokens after they have seen each other."""
        return x + self.attention_gate(self.attention(self.attention_norm(x), mask=mask), signal)

    def attend_to(
        self,
        x: Float[Tensor, "b m c"],
        other: Float[Tensor, "b k c"],
        mask: Bool[Tensor, "b k"],
        signal: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b m c"]:
        """The branch's tokens after they have seen the other branch's real ones, which `mask` marks."""
        assert self.other_norm and self.other_attention and self.other_gate
        attended = self.other_attention.keys_values(self.other_norm(other))
        found = self.other_attention(self.other_norm(x), attended=attended, mask=mask)
        return x + self.other_gate(found, signal)

    def feed(self, x: Float[Tensor, "b m c"], signal: Float[Tensor, "b c"]) -> Float[Tensor, "b m c"]:
        """The branch's tokens after the MLP."""
        return x + self.mlp_gate(self.mlp(self.mlp_norm(x)), signal)


class LinguisticRefiner(nn.Module):
    """States of one language model, or of two of them, and a noise level -> tokens.

    Args:
        widths: channels of each one's states; the first is that of the tokens.
        depth: gated blocks.
    """

    def __init__(self, widths: Sequence[int], depth: int):
        super().__init__()
        width, has_other = widths[0], len(widths) > 1
        self.enter = nn.ModuleList(
            nn.Sequential(RMSNorm(one, eps=1e-6), nn.Identity() if one == width else nn.Linear(one, width))
            for one in widths
        )
        self.time = TimestepEmbedder(width)
        self.mean = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in widths
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(GatedBlock(width, has_other) for _ in widths) for _ in range(depth)
        )

    def forward(self, states: Sequence[Context], t: Float[Tensor, " b"]) -> Context:
        """The refined tokens, those of a second language model behind those of the first."""
        tokens = [enter(one.tokens) for enter, one in zip(self.enter, states, strict=True)]
        masks = [
            one.tokens.new_ones(one.tokens.shape[:2]).bool() if one.mask is None else one.mask
            for one in states
        ]
        at = self.time(t)
        signals = [
            at + project(mean_of(*pair)) for project, *pair in zip(self.mean, tokens, masks, strict=True)
        ]
        for blocks in self.blocks:
            tokens = [block.attend(*one) for block, *one in zip(blocks, tokens, masks, signals, strict=True)]
            if len(tokens) == 2:
                others = tokens[::-1], masks[::-1]
                tokens = [
                    block.attend_to(*one)
                    for block, *one in zip(blocks, tokens, *others, signals, strict=True)
                ]
            tokens = [block.feed(*one) for block, *one in zip(blocks, tokens, signals, strict=True)]
        return Context(torch.cat(tokens, dim=1), torch.cat(masks, dim=1))


def mean_of(tokens: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"]) -> Float[Tensor, "b c"]:
    """The mean of the real tokens."""
    real = mask[..., None].to(tokens.dtype)
    return (tokens * real).sum(1) / real.sum(1)


class LiDitConditioner(Conditioner):
    """The refined states of the instructed prompt, a context of every step.

    Args:
        llm: read without gradients.
        config: the method's settings.
        second: the second language model, where the settings name one.

    Raises: ValueError: where a language model has no such layer.
    """

    def __init__(
        self, llm: LanguageModel, config: LiDitConfig = LiDitConfig(), second: LanguageModel | None = None
    ):
        super().__init__()
        self.llm, self.second = llm, second
        self.layer = config.layer
        self.before: list[list[int]] = []
        """The instruction's token ids in each language model."""
        for one in self.language_models:
            check_taps((config.layer,), len(one.layers), "li_dit reads the hidden state")
            one.projector = None  # visual, so of no use here; left in, it would count as trainable
            self.before += one.token_ids([config.instruction]) if config.instruction else [[]]
            if config.instruction:
                one.leave_room(len(self.before[-1]))
        self.context_widths = (llm.width,)
        self.refiner = LinguisticRefiner([one.width for one in self.language_models], config.refiner_depth)

    @property
    def language_models(self) -> tuple[LanguageModel, ...]:
        """The first, and the second where there is one."""
        return (self.llm,) if self.second is None else (self.llm, self.second)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Instruction and prompt in each language model's tokens, and how many of them are the prompt's."""
        prompts = conditioning_prompts(requests, branches)
        asked = zip(self.language_models, self.before, strict=True)
        return {"asked": [Instructed.of(one, prompts, before) for one, before in asked]}

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """The prompts' states, which are refined at every step; `reuse` changes nothing: they are static."""
        read = zip(self.language_models, inputs["asked"], strict=True)
        return Prepared(states=tuple(self._read(*one) for one in read))

    def _read(self, llm: LanguageModel, asked: "Instructed") -> Context:
        with frozen_reading(asked.prefix.ids.device):
            (state,) = llm.read_layers(asked.prefix, (self.layer,))
        kept = state[:, -asked.most :]
        mask = torch.arange(asked.most, 0, -1, device=kept.device) <= asked.lengths[:, None]
        return Context(kept.to(torch.promote_types(kept.dtype, torch.float32)), mask)

    def condition(self, prepared: Prepared, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The states as noise level t has them refined; z_t does not enter."""
        return Condition(contexts=(self.refiner(prepared.states, t),))


@dataclass(frozen=True)
class Instructed:
    """Prompts behind an instruction: how many of the last tokens of each are its own, and the most of any,
    known on the CPU. Without an instruction that is all of them; behind one a prompt without tokens of its
    own keeps the instruction's last.
    """

    prefix: Prefix
    lengths: Int[Tensor, " b"]
    most: int

    @classmethod
    def of(cls, llm: LanguageModel, prompts: Sequence[str], before: Sequence[int]) -> "Instructed":
        """Raises PromptTooLong where a prompt does not fit behind the instruction, whose ids are `before`."""
        prefix = llm.tokenise(prompts, before)
        cut_off = 1 + len(before) if before else 0  # the begin token stands before the instruction
        lengths = (prefix.mask.sum(1) - cut_off).clamp(min=1)
        return cls(prefix, lengths, int(lengths.max()))
