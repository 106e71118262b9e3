"""The in-context denoiser: condition tokens stand in one sequence with the latent tokens and change with them
from block to block, so that nothing but their embedding can be computed once (UniFusion, arXiv 2510.12789).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.layers import RMSNorm
from repfusion.model.blocks.in_context import InContextBlock
from repfusion.model.denoiser import Prefilled
from repfusion.model.dit import DiT, DiTConfig


class InContextDiT(DiT):
    """A DiT whose one context is part of its sequence.

    Latent tokens stand at their row and column, text along the diagonal after the last of these, reference
    images left of them (`DiT.rotary_of`): no two tokens stand at one place.

    Raises:
        ValueError: a width does not divide or is below the latent width, or the conditioner gives anything
            but one context.
    """

    def __init__(
        self,
        config: DiTConfig,
        latent_dim: int,
        grid: tuple[int, int],
        aligned_width: int | None = None,
        context_widths: tuple[int, ...] = (),
    ):
        super().__init__(config, latent_dim, grid, aligned_width, context_widths)
        (width,), dim = context_widths, config.hidden_size
        self.context_embed = nn.Sequential(
            RMSNorm(width, eps=1e-6), nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim)
        )

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> InContextBlock:
        """A block for one context. Raises ValueError where the conditioner gives anything else."""
        if aligned_width is not None or len(context_widths) != 1:
            raise ValueError(
                f"in context stands one context; the method gives aligned tokens of width {aligned_width} "
                f"and contexts of widths {context_widths}"
            )
        return InContextBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def prefill(self, contexts: tuple[Context, ...], first: int = 0) -> Prefilled:
        """The contexts as the sequence begins with them."""
        tokens = tuple(self.context_embed(context.tokens) for context in contexts)
        masks = tuple(context.mask for context in contexts)
        return Prefilled(masks=masks, tokens=tokens, rotary=tuple(map(self.rotary_of, contexts)))

    def forward(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, static: Prefilled
    ) -> Float[Tensor, "b n d"]:
        """Velocity (noise - latents) at noise level t, [b, n, d]."""
        contexts = static + self.prefill(condition.contexts)
        tokens, mask = contexts.tokens, contexts.masks[0]
        signal = F.silu(self.time(t)[:, None, :])
        modulation = rearrange(self.modulation(signal), "b k (s d) -> b k s d", s=6)
        x = torch.cat([self.embed(z_t) + self.positions, tokens[0]], dim=1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(z_t.shape[:2]), mask], dim=1)
        places = contexts.rotary[0]
        rotary = torch.cat([self.rotary.expand(len(places), *self.rotary.shape), places], dim=1)
        for number, block in enumerate(self.blocks):
            x = self.enter(x, number, tokens)
            x = block(x, modulation, rotary, ((x, x, mask),))
        return self.velocity_of(x[:, : z_t.shape[1]], signal)

    def enter(
        self, x: Float[Tensor, "b n d"], number: int, tokens: tuple[Float[Tensor, "b m d"], ...]
    ) -> Float[Tensor, "b n d"]:
        """The sequence as block `number` gets it, of what `prefill` kept: the tokens are in it from the
        first.
        """
        return x
