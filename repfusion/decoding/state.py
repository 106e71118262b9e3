"""The training of a decoder or a tokenizer <-> the file that it goes on from, exactly: weights, averages,
moments of both optimizers, the spectral norms' vectors, the step, the losses shown and what was measured
(safetensors).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repfusion.decoding.config import RebuildingRecipe
from repfusion.decoding.discriminator import Discriminator
from repfusion.files import atomic_path
from repfusion.foundation.optimise import adamw, put_back, training_tensors
from repfusion.training.ema import EMA

HEADS = "discriminator/"
"""Begins the names of the discriminator's tensors."""
PARAMETERS = ("weight/", "average/", f"{HEADS}weight/", f"{HEADS}vector/")
"""Begin the names of tensors that say which training it is."""


@dataclass
class DecoderProgress:
    """How far a training is."""

    step: int = 0
    """Completed steps."""
    shown: dict[str, float] = field(default_factory=dict)
    """Smoothed losses."""
    history: list[dict[str, float]] = field(default_factory=list)
    """What was measured at intervals, each with its `step`."""
    run: dict[str, str] = field(default_factory=dict)
    """The MLflow run, and the digest of the store that it is in."""


class DecoderState:
    """What a step changes.

    Args:
        decoder: is trained.
        discriminator: whose heads are trained; None where there is none.
        config: of the training.
    """

    def __init__(self, decoder: nn.Module, discriminator: Discriminator | None, config: RebuildingRecipe):
        self.config = config
        self.named = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named, config.length.lr)
        self.ema: EMA | None = None
        if config.ema_decay is not None:
            weights = list(self.named.values())
            self.ema = EMA(weights, config.ema_decay, ramp=config.init_from is None)
        self.heads: dict[str, nn.Parameter] = {}
        self.vectors: dict[str, Tensor] = {}
        self.heads_optimizer: torch.optim.AdamW | None = None
        if discriminator is not None and config.adversarial is not None:
            self.heads = dict(discriminator.heads.named_parameters())
            self.vectors = dict(discriminator.heads.named_buffers())
            # their scale is divided out, so that decay would only change their learning rate
            self.heads_optimizer = adamw(self.heads, config.adversarial.lr, weight_decay=0.0)

    def head_updates(self, step: int) -> int:
        """Updates of the discriminator within so many steps."""
        return 0 if self.config.adversarial is None else max(0, step - self.first_of_heads)

    @property
    def first_of_heads(self) -> int:
        """The step at which the discriminator is trained first."""
        assert self.config.adversarial is not None
        return self.config.adversarial.discriminator_from_step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averages in the place of the decoder's weights for the length of the block."""
        if self.ema is None:
            yield
            return
        kept = [p.detach().clone() for p in self.named.values()]
        self._fill(self.ema.averages)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.named.values(), values, strict=True):
            parameter.copy_(value)

    def save(self, path: Path, progress: DecoderProgress) -> None:
        """Writes the file, whole or not at all."""
        tensors = {"step": torch.tensor(progress.step), **training_tensors(self.named, self.optimizer)}
        tensors |= self._beside()
        if self.heads_optimizer is not None and self.head_updates(progress.step):
            moments = training_tensors(self.heads, self.heads_optimizer)
            tensors |= {f"{HEADS}{name}": one for name, one in moments.items()}
        tensors |= {f"loss/{name}": _double(value) for name, value in progress.shown.items()}
        for name in progress.history[0] if progress.history else ():
            tensors[f"measured/{name}"] = _double([one[name] for one in progress.history])
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), progress.run or None)

    def _beside(self) -> dict[str, Tensor]:
        """Averages, and the discriminator without its moments."""
        averages = [] if self.ema is None else zip(self.named, self.ema.averages, strict=True)
        found = {f"average/{name}": average for name, average in averages}
        found |= {f"{HEADS}weight/{name}": p.detach() for name, p in self.heads.items()}
        found |= {f"{HEADS}vector/{name}": vector for name, vector in self.vectors.items()}
        return {name: one.cpu().contiguous() for name, one in found.items()}

    @torch.no_grad()
    def load(self, path: Path) -> DecoderProgress:
        """Puts back what `save` wrote; returns how far the training was.

        Raises:
            ValueError: the file is of another training, or of a longer one.
        """
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            run = dict(file.metadata() or {})
        own = {f"weight/{name}": p.shape for name, p in self.named.items()}
        own |= {name: one.shape for name, one in self._beside().items()}
        kept = {name: one.shape for name, one in tensors.items() if name.startswith(PARAMETERS)}
        step, num_steps = int(tensors["step"]), self.config.length.num_steps
        if own != kept or step > num_steps:
            raise ValueError(
                f"{path}: state of another training (step {step} of {num_steps}, "
                f"{len(own.items() ^ kept.items())} weights differ); remove it, or train as before"
            )
        put_back(self.named, self.optimizer, tensors, step)
        if self.ema is not None:
            for name, average in zip(self.named, self.ema.averages, strict=True):
                average.copy_(tensors[f"average/{name}"])
        for name, parameter in self.heads.items():
            parameter.copy_(tensors[f"{HEADS}weight/{name}"])
        for name, vector in self.vectors.items():
            vector.copy_(tensors[f"{HEADS}vector/{name}"])
        if self.heads_optimizer is not None and (updates := self.head_updates(step)):
            put_back(self.heads, self.heads_optimizer, _below(tensors, HEADS), updates)
        shown = {name: one.item() for name, one in _below(tensors, "loss/").items()}
        columns = {name: one.tolist() for name, one in _below(tensors, "measured/").items()}
        history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return DecoderProgress(step, shown, history, run)


def _below(tensors: Mapping[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): one for name, one in tensors.items() if name.startswith(beginning)}


def _double(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
