"""What every denoiser is: (z_t, t, condition) -> velocity, with the keys and values of what no step changes
kept.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.model.blocks.adaln import Attended


@dataclass(frozen=True)
class Prefilled:
    """Contexts as a denoiser's blocks read them: keys and values [b h m e] by context and block."""

    keys_values: tuple[tuple[tuple[Tensor, Tensor], ...], ...] = ()
    masks: tuple[Bool[Tensor, "b _"] | None, ...] = ()
    tokens: tuple[Float[Tensor, "b _ d"], ...] = ()
    """Contexts that are part of a denoiser's sequence, as they enter it."""
    rotary: tuple[Float[Tensor, "_ _ half 2"], ...] = ()
    """Where their tokens stand: the angles of each row, or one for all."""

    def __add__(self, other: "Prefilled") -> "Prefilled":
        keys_values, masks = self.keys_values + other.keys_values, self.masks + other.masks
        return Prefilled(keys_values, masks, self.tokens + other.tokens, self.rotary + other.rotary)

    def of_block(self, number: int) -> tuple[Attended, ...]:
        """Keys, values and mask of every context in one block."""
        pairs = zip(self.keys_values, self.masks, strict=True)
        return tuple((*blocks[number], mask) for blocks, mask in pairs)

    def first(self, num: int) -> "Prefilled":
        """Keys and values of the first `num` rows, as views."""
        rows = tuple(tuple((k[:num], v[:num]) for k, v in blocks) for blocks in self.keys_values)
        masks = tuple(None if mask is None else mask[:num] for mask in self.masks)
        tokens, rotary = (tuple(one[:num] for one in part) for part in (self.tokens, self.rotary))
        return Prefilled(rows, masks, tokens, rotary)


class Denoiser(nn.Module):
    """Built for exactly the widths that its conditioner gives; `out` is its last layer."""

    out: nn.Linear

    @property
    def layers(self) -> list[nn.Module]:
        """Repeated blocks, which are compiled and checkpointed one by one."""
        return list(getattr(self, "blocks", ()))

    def prefill(self, contexts: tuple[Context, ...]) -> Prefilled:
        """What attending to contexts needs of them, once for all steps."""
        raise NotImplementedError

    def forward(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, static: Prefilled
    ) -> Float[Tensor, "b n d"]:
        """Velocity (noise - latents) at noise level t.

        Args:
            z_t: noisy latents.
            t: noise level of each row.
            condition: what changes from step to step.
            static: `prefill` of what does not.
        """
        raise NotImplementedError
