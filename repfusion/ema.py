"""Exponential moving average of the trainable weights, in float32 (as DDPM, arXiv 2006.11239)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """`average = decay * average + (1 - decay) * weight` after each step.

    Args:
        parameters: name -> parameter, the ones that train; read at every update.
        decay: in [0, 1).
        ramp: start with the decay (1 + step) / (10 + step) while it is below `decay`, so that the average of
            a model trained from scratch forgets its random start. A model that continues from a base starts
            from good weights and needs none.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, ramp: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}, expected 0 <= ema_decay < 1")
        self.parameters = dict(parameters)
        self.decay, self.ramp = decay, ramp
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` completed steps (the first update has step 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay_at(step))

    def state(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Strict: ValueError where a name or a shape differs."""
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())
            raise ValueError(
                f"EMA weights do not match the model: {odd[0]} is on one side only ({len(odd)} such tensors)"
            )
        for name, value in self.average.items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"EMA tensor {name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
                )
            value.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; the trained ones come back afterwards, bit for
        bit.
        """
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
            try:
                yield
            finally:
                for name, p in self.parameters.items():
                    p.copy_(kept[name])
