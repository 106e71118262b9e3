"""Micro-batches -> the gradients of one step of a decoder and of its discriminator: L1 + LPIPS + the adaptive
adversarial loss (RAE, arXiv 2510.11690, section 3; VQGAN, arXiv 2012.09841, equation 7).

The adaptive weight needs the gradients of the whole batch at the last layer before any of them can go on
through the decoder. So the losses' gradients stop at what the last layer reads and are kept there, a small
tensor for each micro-batch; once the weight is known they go through the rest. That takes the same passes
as a plain step where the batch is one micro-batch, and the decoder's forward pass twice where it is several.
The sum of N micro-batches, on any number of ranks, is then that of one batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.decoding.discriminator import Discriminator, discriminator_loss, generator_loss
from repfusion.decoding.perceptual import LPIPS
from repfusion.decoding.ranks import Ranks
from repfusion.devices.compiling import Compilation
from repfusion.foundation.optimise import forward_pass

LARGEST_WEIGHT = 1e4
"""Bound of the adaptive weight."""
DELTA = 1e-6
"""What equation 7 of VQGAN adds to the length that it divides by."""

Part = tuple[Float[Tensor, "b 3 h w"], Any]
"""Pixels of a micro-batch in [0, 1], and what they are rebuilt from: a decoder's noised features, what one
that draws reads, or what a tokenizer is shown.
"""
Hidden = tuple[Tensor, dict[str, Tensor]]
"""What the last layer reads, and losses by name that do not go through it."""


@runtime_checkable
class Rebuilds(Protocol):
    """A network that ends in pixels."""

    @property
    def out(self) -> nn.Module:
        """The last layer."""
        ...

    def to_pixels(self, hidden: Tensor) -> Tensor:
        """What the last layer makes of what it reads."""
        ...


def adaptive_weight(
    reconstruction: Float[Tensor, "..."], adversarial: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """The ratio of the lengths of two gradients at the last layer, at most 1e4 (VQGAN, equation 7)."""
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + DELTA)
    return ratio.clamp(max=LARGEST_WEIGHT)


class Gradients:
    """How the gradients of a step are made; each of the two ways leaves them, of this rank's share alone, in
    `grad` of what is trained.

    Args:
        decoder: is trained.
        hidden: what its last layer reads, of what pixels are rebuilt from.
        perceptual: LPIPS and its weight beside the pixels' L1; None does without.
        adversary: the discriminator and the weight of its loss beside the adaptive one; None does without.
        ranks: that share each batch.
        compilation: of the decoder and, in plain steps, of the losses; None runs them as they are.
    """

    def __init__(
        self,
        decoder: Rebuilds,
        hidden: Callable[[Any], Hidden],
        perceptual: tuple[LPIPS, float] | None,
        adversary: tuple[Discriminator, float] | None,
        ranks: Ranks,
        compilation: Compilation | None,
    ):
        self.decoder, self.ranks = decoder, ranks
        self.perceptual, self.adversary = perceptual, adversary
        self.device = next(decoder.out.parameters()).device
        self._plain_hidden = self.hidden = hidden
        self.rebuild: Callable[[Tensor, Any], dict[str, Tensor]] = self._rebuild
        if compilation is not None:
            self.rebuild, self.hidden = compilation(self._rebuild), compilation(hidden)

    def _rebuild(self, pixels: Tensor, seen: Any) -> dict[str, Tensor]:
        hidden, beside = self._plain_hidden(seen)
        return {**self.losses(self.decoder.to_pixels(hidden).float(), pixels), **beside}

    def losses(
        self, rebuilt: Float[Tensor, "b 3 h w"], pixels: Float[Tensor, "b 3 h w"]
    ) -> dict[str, Float[Tensor, ""]]:
        """L1 and LPIPS of what is rebuilt, weighted, by name."""
        found = {"pixels": F.l1_loss(rebuilt, pixels)}
        if self.perceptual is not None:
            network, weight = self.perceptual
            found["perceptual"] = weight * network(rebuilt, pixels).mean()
        return found

    def plain(self, parts: Sequence[Part]) -> dict[str, Float[Tensor, ""]]:
        """Gradients without a discriminator; returns the losses, each a mean over the micro-batches."""
        found = []
        for pixels, seen in parts:
            with forward_pass(self.device):
                losses = self.rebuild(pixels, seen)
                total = torch.stack(list(losses.values())).sum() / len(parts)
            total.backward()
            found.append(losses)
        return means(found)

    def adversarial(self, parts: Sequence[Part], is_on: bool) -> dict[str, Float[Tensor, ""]]:
        """Gradients of the discriminator, and of the decoder with the adversarial loss where that `is_on`;
        returns the losses, each a mean over the micro-batches, and the adaptive weight. Called by all ranks.
        """
        assert self.adversary is not None
        discriminator, weight = self.adversary
        discriminator.refresh()
        head = list(self.decoder.out.parameters())
        own, against = ([torch.zeros_like(p) for p in head] for _ in range(2))
        found: list[dict[str, Tensor]] = []
        kept: list[tuple[Hidden | None, Tensor, Tensor]] = []
        for pixels, seen in parts:
            with forward_pass(self.device):
                hidden, beside = self.hidden(seen)
                leaf = hidden.detach().requires_grad_()
                rebuilt = self.decoder.to_pixels(leaf).float()
                losses = self.losses(rebuilt, pixels)
                total = torch.stack(list(losses.values())).sum() / len(parts)
                losses["generator"] = generator_loss(discriminator(rebuilt if is_on else rebuilt.detach()))
                judged = discriminator(pixels), discriminator(rebuilt.detach())
                losses["discriminator"] = discriminator_loss(*judged)
            *grads, grad = torch.autograd.grad(total, [*head, leaf], retain_graph=is_on)
            torch._foreach_add_(own, grads)
            grad_against = torch.zeros_like(grad)
            if is_on:
                inputs = [*head, leaf]
                *grads, grad_against = torch.autograd.grad(losses["generator"] / len(parts), inputs)
                torch._foreach_add_(against, grads)
            (losses["discriminator"] / len(parts)).backward()
            kept.append(((hidden, beside) if len(parts) == 1 else None, grad, grad_against))
            found.append({**losses, **beside})
        adaptive = adaptive_weight(*self.ranks.mean([own[0], against[0]])) if is_on else own[0].new_zeros(())
        for parameter, one, other in zip(head, own, against, strict=True):
            parameter.grad = one + weight * adaptive * other
        for (_, seen), (made, grad, grad_against) in zip(parts, kept, strict=True):
            if made is None:
                with forward_pass(self.device):
                    made = self.hidden(seen)
            hidden, beside = made
            grad = (grad + weight * adaptive * grad_against).to(hidden.dtype)
            others = [loss / len(parts) for loss in beside.values()]
            torch.autograd.backward([hidden, *others], [grad, *(None for _ in others)])
        return {**means(found), "adaptive_weight": adaptive}


def means(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[Tensor, ""]]:
    """The mean over the micro-batches of each loss."""
    return {name: torch.stack([one[name].detach() for one in losses]).mean() for name in losses[0]}
