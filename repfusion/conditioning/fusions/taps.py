"""Taps: the hidden states of a prompt in chosen layers of the frozen language model, and how many of them a
model has.

Hidden states are counted as transformers counts them: 0 are the embeddings, i the output of layer i, -1 the
last layer's after the final norm.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning.base import Conditioner, Context, conditioning_prompts, frozen_reading
from repfusion.inputs import Inputs
from repfusion.layers import EncoderBlock, RMSNorm
from repfusion.llm.base import LanguageModel, Prefix, to_the_left
from repfusion.request import Branch, Request

HEAD_WIDTH = 64
"""Channels of an attention head in the blocks that conditioners train."""


def check_taps(taps: Sequence[int], num_layers: int, whose: str) -> None:
    """Whether a language model of so many layers has the taps; `whose` begins the message.

    Raises:
        ValueError: one lies beyond its layers.
    """
    for tap in taps:
        if not -num_layers - 1 <= tap <= num_layers:
            raise ValueError(
                f"{whose} {tap}, the language model has {num_layers} layers; expected 0 to "
                f"{num_layers}, or -1 to {-num_layers - 1} from the last"
            )


def spread(number: int, num_layers: int) -> tuple[int, ...]:
    """Layers, as many as asked for, counted from 1, spread evenly up to the last: all of them where the
    numbers agree, some twice where there are fewer layers.
    """
    return tuple(-(-(place + 1) * num_layers // number) for place in range(number))


class TokenRefiner(nn.Module):
    """Bidirectional blocks over a prompt's tokens and an RMSNorm with gain: what is read causally learns what
    comes after it. Padding is not seen.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        num_heads = max(1, width // HEAD_WIDTH)
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads) for _ in range(depth))
        self.norm = RMSNorm(width, eps=1e-6)

    def forward(
        self, x: Float[Tensor, "b m c"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b m c"]:
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class TapsConditioner(Conditioner):
    """A conditioner of the prompt alone, which is the same at every step.

    Args:
        llm: read without gradients; it loses its projector, which is visual, so of no use here: left in, it
            would count as trainable.
        taps: hidden states that are read.
    """

    def __init__(self, llm: LanguageModel, taps: Sequence[int]):
        super().__init__()
        check_taps(taps, len(llm.layers), "the method names the hidden state")
        self.llm = llm
        llm.projector = None
        self.taps = tuple(taps)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompt tokens."""
        return {"prefix": self.llm.tokenise(conditioning_prompts(requests, branches))}

    def contexts(self, prefix: Prefix) -> tuple[Context, ...]:
        """Hidden states of each tap, real tokens first."""
        with frozen_reading(prefix.ids.device):
            states = self.llm.read_layers(prefix, self.taps)
        return padded_after(states, prefix.mask)


def padded_after(states: Sequence[Float[Tensor, "b m _"]], mask: Bool[Tensor, "b m"]) -> tuple[Context, ...]:
    """Left-padded states as contexts, float32 at least, whose padding lies at the end; they share one
    mask.
    """
    own = to_the_left(mask[..., None], mask)[..., 0]
    moved = (to_the_left(one, mask) for one in states)
    return tuple(Context(one.to(torch.promote_types(one.dtype, torch.float32)), own) for one in moved)
