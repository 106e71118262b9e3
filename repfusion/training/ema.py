"""Exponential moving average of the trainable weights, in float32 (as DDPM, arXiv 2006.11239)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """`average = decay * average + (1 - decay) * weight` after each step.

    Args:
        weights: the tensors that the optimizer updates, read at every update. Under ZeRO these are the
            rank's own share, so that the average is shared out like the optimizer's state.
        decay: in [0, 1).
        ramp: start with the decay (1 + step) / (10 + step) while it is below `decay`, so that the average of
            a model trained from scratch forgets its random start. A model that continues from a base starts
            from good weights and needs none.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, ramp: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}, expected 0 <= ema_decay < 1")
        self.weights = list(weights)
        self.decay, self.ramp = decay, ramp
        self.averages = [weight.detach().float().clone() for weight in self.weights]

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` completed steps (the first update has step 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        weights = [weight.detach().float() for weight in self.weights]
        torch._foreach_lerp_(self.averages, weights, 1 - self.decay_at(step))
