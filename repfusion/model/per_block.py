"""Denoisers that have a context for each block, none of which changes from step to step.

`JointKeysDiT` attends to it beside the latent tokens; `InjectedDiT` adds it to condition tokens in its
sequence.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning.base import Context
from repfusion.layers import Grid, rotate
from repfusion.model.blocks.in_context import InContextBlock
from repfusion.model.blocks.joint_keys import JointKeysBlock
from repfusion.model.denoiser import Prefilled
from repfusion.model.dit import DiT, DiTConfig
from repfusion.model.in_context import InContextDiT


def width_of(config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]) -> int:
    """The width of the contexts, which are one a block.

    Raises:
        ValueError: the conditioner gives anything else.
    """
    if aligned_width is not None or len(context_widths) != config.depth or len(set(context_widths)) != 1:
        raise ValueError(
            f"each of {config.depth} blocks takes a context of one width; the method gives aligned tokens of "
            f"width {aligned_width} and contexts of widths {context_widths}"
        )
    return context_widths[0]


class JointKeysDiT(DiT):
    """A DiT whose latent tokens attend to the context of their block too, which stands along the diagonal
    after the grid, as condition tokens in context do.

    Raises:
        ValueError: a width does not divide or is below the latent width, or the conditioner gives anything
            but a context for each block.
    """

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> JointKeysBlock:
        """A block for its context. Raises ValueError where the conditioner gives anything else."""
        width = width_of(config, aligned_width, context_widths)
        return JointKeysBlock(config.hidden_size, config.num_heads, config.mlp_ratio, width)

    def prefill(self, contexts: tuple[Context, ...], first: int = 0) -> Prefilled:
        """Keys, at their places, and values of each block's own context."""
        if not contexts:
            return Prefilled()
        rotary = self.rotary_of(contexts[0])
        pairs = zip(self.blocks, contexts, strict=True)
        kept = tuple(block.keys_values(0, context.tokens) for block, context in pairs)
        return Prefilled((tuple((rotate(k, rotary), v) for k, v in kept),), (contexts[0].mask,))


class InjectedDiT(InContextDiT):
    """A DiT whose sequence begins with the first block's context and is added each later block's.

    Raises:
        ValueError: a width does not divide or is below the latent width, or the conditioner gives anything
            but a context for each block.
    """

    def __init__(
        self,
        config: DiTConfig,
        latent_dim: int,
        grid: Grid,
        aligned_width: int | None = None,
        context_widths: tuple[int, ...] = (),
    ):
        width = width_of(config, aligned_width, context_widths)
        super().__init__(config, latent_dim, grid, None, (width,))
        self.injections = nn.ModuleList(
            nn.Linear(width, config.hidden_size, bias=False) for _ in range(config.depth - 1)
        )

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> InContextBlock:
        """A block of the sequence, which is given what it adds."""
        return InContextBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def prefill(self, contexts: tuple[Context, ...], first: int = 0) -> Prefilled:
        """The first block's context as the sequence begins with it, then what the later blocks add."""
        if not contexts:
            return Prefilled()
        begins, *others = contexts
        added = (one(context.tokens) for one, context in zip(self.injections, others, strict=True))
        tokens = self.context_embed(begins.tokens), *added
        return Prefilled(masks=(begins.mask,), tokens=tokens, rotary=(self.rotary_of(begins),))

    def passed(
        self,
        number: int,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "rows n half 2"],
        mask: Bool[Tensor, "b m"] | None,
        contexts: Prefilled,
    ) -> Float[Tensor, "b n d"]:
        """The sequence after block `number`, whose context was added to its condition tokens before."""
        if number:
            added = contexts.tokens[number]
            num_latents = x.shape[1] - added.shape[1]
            x = torch.cat([x[:, :num_latents], x[:, num_latents:] + added], dim=1)
        return super().passed(number, x, modulation, rotary, mask, contexts)
