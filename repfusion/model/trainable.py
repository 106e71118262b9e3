"""What a training loop asks of a model: inputs of samples, losses by name, and which weights it trains."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repfusion.conditioning.base import Losses
from repfusion.config import Config
from repfusion.data.dataset import Sample
from repfusion.data.readers import Reader
from repfusion.data.recipe import Recipe
from repfusion.inputs import Inputs


class Trainable(nn.Module):
    """A model that the engine trains, a snapshot saves and the data serves, whatever it learns."""

    config: Config
    columns: Mapping[str, Reader]
    """How it reads the columns that it can use beside captions, by name."""

    def collate(self, samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> Inputs:
        """Inputs of a micro-batch on the CPU, with all randomness, from each sample's 64-bit seed. This runs
        in the thread that reads ahead.
        """
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Losses:
        """Losses by name, one a sample; see `Losses`."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the trained weights lie."""
        return next(p for p in self.parameters() if p.requires_grad).device

    def layers(self) -> list[nn.Module]:
        """Repeated parts that do nearly all of the work: compiled and checkpointed one by one."""
        raise NotImplementedError

    def frozen_parts(self) -> list[nn.Module]:
        """Modules without a trained parameter that hold most of the weights."""
        return []

    def checkpoint_activations(self) -> None:
        """Computes the activations of each layer again in the backward pass from now on."""
        for layer in self.layers():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def compile_blocks(self) -> None:
        """Compiles the layers with torch.compile, in place."""
        for layer in self.layers():
            layer.compile()

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies the trained parameters, strictly. Raises ValueError naming what is missing, unknown or of
        another shape.
        """
        own = self.trainable_state()
        problems = [f"{name}: missing" for name in own.keys() - state.keys()]
        problems += [f"{name}: unknown" for name in state.keys() - own.keys()]
        for name in own.keys() & state.keys():
            if own[name].shape != state[name].shape:
                problems.append(f"{name}: {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
        if problems:
            raise ValueError(
                "weights of another geometry: "
                + "; ".join(sorted(problems)[:6])
                + f" ({len(problems)} in all)"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
