"""The in-context denoisers: condition tokens stand in one sequence with the latent tokens and change with
them from block to block, so that nothing but their embedding can be computed once (UniFusion, arXiv
2510.12789); or those of references stand apart, see each other alone and are computed once (FLUX.2 klein).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.layers import Grid, RMSNorm
from repfusion.model.blocks.in_context import InContextBlock
from repfusion.model.blocks.references import Kept, ReferenceBlock
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
        grid: Grid,
        aligned_width: int | None = None,
        context_widths: tuple[int, ...] = (),
    ):
        super().__init__(config, latent_dim, grid, aligned_width, context_widths)
        width, dim = context_widths[0], config.hidden_size
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
        signal, modulation = self.modulated(t)
        x = torch.cat([self.embed(z_t) + self.positions, contexts.tokens[0]], dim=1)
        places, mask = contexts.rotary[0], self.mask_of(z_t, contexts)
        rotary = torch.cat([self.rotary.expand(len(places), *self.rotary.shape), places], dim=1)
        for number in range(len(self.blocks)):
            x = self.passed(number, x, modulation, rotary, mask, contexts)
        return self.velocity_of(x[:, : z_t.shape[1]], signal)

    def modulated(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 c"], Float[Tensor, "b 1 6 d"]]:
        """The signal of noise level t, and scales, shifts and gates of all blocks from it."""
        signal = F.silu(self.time(t)[:, None, :])
        return signal, rearrange(self.modulation(signal), "b k (s d) -> b k s d", s=6)

    def mask_of(self, z_t: Float[Tensor, "b n d"], contexts: Prefilled) -> Bool[Tensor, "b m"] | None:
        """Which of the tokens that the sequence sees are real; None is all."""
        mask = contexts.masks[0]
        return None if mask is None else torch.cat([mask.new_ones(z_t.shape[:2]), mask], dim=1)

    def passed(
        self,
        number: int,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "rows n half 2"],
        mask: Bool[Tensor, "b m"] | None,
        contexts: Prefilled,
    ) -> Float[Tensor, "b n d"]:
        """The sequence after block `number`, with what that takes of `contexts`."""
        return self.blocks[number](x, modulation, rotary, ((x, x, mask),))


class ReferencesDiT(InContextDiT):
    """An in-context DiT whose second context, of reference images, is a stream of its own.

    Its tokens see each other alone and are modulated as at noise level 0, so that their keys and values in
    every block are the same at every step, whatever the latents are; latents and text see them beside
    themselves. The weights are those of `InContextDiT`, whose velocities it has where there is no reference.

    Raises:
        ValueError: a width does not divide or is below the latent width, or the conditioner gives anything
            but two contexts of one width.
    """

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> ReferenceBlock:
        """A block for both contexts. Raises ValueError where the conditioner gives anything else."""
        if aligned_width is not None or len(context_widths) != 2 or len(set(context_widths)) != 1:
            raise ValueError(
                "references beside a sequence take two contexts of one width, of text and of images; the "
                f"method gives aligned tokens of width {aligned_width} and contexts of widths "
                f"{context_widths}"
            )
        return ReferenceBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def prefill(self, contexts: tuple[Context, ...], first: int = 0) -> Prefilled:
        """The text as the sequence begins with it, then keys and values of the references in every block."""
        if not contexts:
            return Prefilled()
        text, references = map(self._masked, contexts)
        return super().prefill((text,)) + Prefilled((self.kept(references),), (references.mask,))

    def kept(self, references: Context) -> tuple[Kept, ...]:
        """Keys, at their places, and values of the references in every block."""
        _, modulation = self.modulated(references.tokens.new_zeros(len(references.tokens)))
        x, rotary = self.context_embed(references.tokens), self.rotary_of(references)
        mask = references.mask
        assert mask is not None
        # attention to nothing has no value: where a row has no reference, nobody sees what it sees
        mask = mask | ~mask.any(1, keepdim=True)
        found = []
        for number, block in enumerate(self.blocks, 1):
            x, own = block(x, modulation, rotary, mask=mask, goes_on=number < len(self.blocks))
            found.append(own)
        return tuple(found)

    def mask_of(self, z_t: Float[Tensor, "b n d"], contexts: Prefilled) -> Bool[Tensor, "b m"] | None:
        """Which of latents, text and references are real."""
        own = super().mask_of(z_t, contexts)
        assert own is not None
        return torch.cat([own, contexts.masks[1]], dim=1)

    def passed(
        self,
        number: int,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b k 6 d"],
        rotary: Float[Tensor, "rows n half 2"],
        mask: Bool[Tensor, "b m"] | None,
        contexts: Prefilled,
    ) -> Float[Tensor, "b n d"]:
        """The sequence after block `number`, which sees the references too."""
        return self.blocks[number](x, modulation, rotary, contexts.keys_values[0][number], mask)[0]

    @staticmethod
    def _masked(context: Context) -> Context:
        if context.mask is not None:
            return context
        return replace(context, mask=context.tokens.new_ones(context.tokens.shape[:2], dtype=torch.bool))
