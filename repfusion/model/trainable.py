"""What a training loop asks of a model: inputs of samples, losses by name, and which weights it trains."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from repfusion.conditioning.base import Losses
from repfusion.config import Config, Wanted, weights_of
from repfusion.data.dataset import Sample
from repfusion.data.readers import Reader
from repfusion.data.recipe import Recipe
from repfusion.devices.compiling import Compilation
from repfusion.inputs import Inputs
from repfusion.llm.base import PromptTooLong

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.linear.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operators whose results selective checkpointing keeps: they take nearly all of a layer's time. Not `bmm`:
attention written out would have it keep every score.
"""


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What selective checkpointing does with an operator's result (torch's policy function)."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def computed_again(forward: Callable[..., Any], which: Literal["selective", "full"]) -> Callable[..., Any]:
    """A layer's function, of whose activations only some are kept; see `Trainable.checkpoint_activations`."""
    if which == "full":  # without a context: the compiler takes only one that it can look into

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    else:
        keep = partial(create_selective_checkpoint_contexts, keep_products)

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=keep, **kwargs)

    return checkpointed


class TrainableConfig(Config):
    """The configuration of a model, and what a training has to know of it before it is built."""

    @property
    def columns(self) -> Mapping[str, Reader]:
        """How the model reads the columns that it can use beside captions, by name; no weights are read."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    @property
    def reads_images(self) -> bool:
        """Whether requests may have images."""
        return False

    @property
    def needs_start(self) -> bool:
        """Whether a training has to start from a checkpoint, which holds what the model keeps frozen."""
        return False

    def parts(self, wanted: Wanted = lambda weights: True) -> dict[str, Path]:
        """Folders of frozen weights by part, such as `encoder`, `mllm`, `decoder` and those of the method."""
        found = weights_of(self, wanted=wanted)
        return {key.removesuffix(".path"): found[key] for key in sorted(found)}

    def describe(self) -> str:
        """The model and its size, in a few words."""
        raise NotImplementedError


@runtime_checkable
class CaptionReader(Protocol):
    """Who puts captions into tokens, and how long these may be."""

    folder: Path
    """The folder of the tokenizer."""
    max_text_tokens: int

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """Raises PromptTooLong where one is longer than that."""
        ...


class Trainable(nn.Module):
    """A model that the engine trains, a snapshot saves and the data serves, whatever it learns."""

    config: TrainableConfig
    columns: Mapping[str, Reader]
    """How it reads the columns that it can use beside captions, by name."""
    fixed: Mapping[str, tuple[int, ...]] = {}
    """Shapes of the buffers, by name, that are saved with the trained weights, since those mean something
    else without; a model has all of them or none.
    """
    kept: Mapping[str, nn.Parameter] = {}
    """Frozen parameters, by name, that are saved with the trained weights, since no folder holds them."""

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

    @property
    def captions(self) -> CaptionReader:
        """Who reads its captions."""
        raise NotImplementedError

    def unfit_caption(self, error: PromptTooLong) -> str:
        """What is wrong with a caption of a training, and what to do."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Repeated parts that do nearly all of the work: compiled and checkpointed one by one."""
        raise NotImplementedError

    def frozen_parts(self) -> list[nn.Module]:
        """Modules without a trained parameter that hold most of the weights."""
        return []

    def checkpoint_activations(self, which: Literal["selective", "full"] = "full") -> None:
        """Computes activations of each layer again in the backward pass from now on: all of them, or those
        that no matrix product made (Korthikanti et al., arXiv 2205.05198, for the idea of a selection).
        """
        for layer in self.layers():
            layer.forward = computed_again(layer.forward, which)

    def compile_blocks(self, compilation: Compilation) -> None:
        """Compiles the layers one by one, in place."""
        for layer in self.layers():
            compilation.module(layer)

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def fixed_state(self) -> dict[str, Tensor]:
        """What is saved with the trained weights and no step changes, by name."""
        buffers = {name: self.get_buffer(name) for name in self.fixed}
        found = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        return {**found, **{name: parameter.detach() for name, parameter in self.kept.items()}}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies the trained parameters, strictly. Raises ValueError naming what is missing, unknown or of
        another shape.
        """
        own = self.trainable_state()
        check_shapes(state, {name: parameter.shape for name, parameter in own.items()})
        copy_into(own, state)

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies what a file holds, strictly: the trained parameters, the frozen ones that are saved with
        them, and such buffers. Where it has no such buffers, the model has none from now on. Raises as
        `load_trainable_state`.
        """
        own = {**self.trainable_state(), **self.kept}
        has_fixed = not state.keys().isdisjoint(self.fixed)
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        check_shapes(state, {**shapes, **(self.fixed if has_fixed else {})})
        copy_into(own, state)
        for name in self.fixed:
            module, _, buffer = name.rpartition(".")
            value = state[name].to(self.device, torch.float32) if has_fixed else None
            setattr(self.get_submodule(module), buffer, value)

    def load_part(self, state: Mapping[str, Tensor]) -> list[str]:
        """Copies some of what is saved, and all of the frozen parameters; returns the names of the trained
        ones that stay as they are. Raises ValueError naming what is unknown, of another shape, or frozen and
        missing.
        """
        own = {**self.trainable_state(), **self.kept}
        expected = {name: tuple(own[name].shape) for name in own.keys() & state.keys() | self.kept.keys()}
        check_shapes(state, expected)
        copy_into({name: own[name] for name in expected}, state)
        return sorted(own.keys() - expected.keys())


def copy_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Gives parameters the values of a state that has all of them."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError naming tensors that are missing, unknown or of another shape than expected."""
    problems = [f"{name}: missing" for name in expected.keys() - state.keys()]
    problems += [f"{name}: unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        if tuple(state[name].shape) != tuple(expected[name]):
            problems.append(f"{name}: {tuple(state[name].shape)}, expected {tuple(expected[name])}")
    if problems:
        raise ValueError(
            "weights of another geometry: " + "; ".join(sorted(problems)[:6]) + f" ({len(problems)} in all)"
        )
