"""A model -> bytes of the activations that a sample's training keeps between its forward and its backward
pass, by what is kept of them; the largest micro-batch of a device follows.

Counted is what autograd saves, each tensor once and weights not, on tensors without memory under bfloat16
autocast, frozen weights in bfloat16. What a layer holds for a moment, workspaces and the allocator's holes
are not. Compiled without checkpointing lies between `products` and `eager`: the compiler computes again what
is cheap.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from repfusion.flops.count import Counter, prompt_of
from repfusion.inputs import Inputs, map_tensors
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import PRODUCTS
from repfusion.request import Request


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes a sample."""

    eager: float
    """Nothing is computed again."""
    products: float
    """Results of matrix products and of attention: `activation_checkpointing: selective`."""
    layer_inputs: float
    """What enters each layer: `activation_checkpointing: full`."""


def activation_bytes(model: TextToImage, num_text_tokens: int) -> ActivationBytes:
    """Bytes that one sample adds to a micro-batch: what two keep more than one.

    Args:
        model: on any device, meta included, of a method that reads no images.
        num_text_tokens: tokens of a prompt, begin token included.
    """
    counter = Counter(model)
    one, two = (_Kept(counter, num, num_text_tokens).found for num in (1, 2))
    return ActivationBytes(*(b - a for a, b in zip(one, two, strict=True)))


class _Products(TorchDispatchMode):
    """Counts bytes of what PRODUCTS return while it is on."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.num_bytes += num_bytes(out[0] if isinstance(out, tuple) else out)
        return out


class _Kept:
    """What a forward pass over `num` samples keeps; `found` are bytes in the order of ActivationBytes."""

    def __init__(self, counter: Counter, num: int, num_tokens: int):
        self.saved: dict[int, Tensor] = {}
        self.entering = 0
        model, products = counter.model, _Products()
        some = inputs_of(model, num, num_tokens)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
            without_memory(model)
            self.weights = {one.untyped_storage()._cdata for one in model.parameters()}
            inputs = map_tensors(some, lambda one: torch.empty(one.shape, dtype=one.dtype))
            hooks = [layer.register_forward_pre_hook(self._enter) for layer in model.layers()]
            kept = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
            with torch.autocast("cpu", torch.bfloat16), kept, products:
                model(inputs)
            for hook in hooks:
                hook.remove()
            eager = sum(one.untyped_storage().nbytes() for one in self.saved.values())
        self.found = float(eager), float(products.num_bytes), float(self.entering)

    def _keep(self, tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage()._cdata) not in self.weights:
            self.saved[place] = tensor  # held, so that no other takes its place
        return tensor

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.entering += num_bytes(args[0])


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def without_memory(model: TextToImage) -> None:
    """Gives a model weights, buffers and statistics of the CPU that have no memory, under a FakeTensorMode;
    frozen weights in bfloat16.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                dtype = weight.dtype if weight.requires_grad else torch.bfloat16
                new = nn.Parameter(torch.empty(weight.shape, dtype=dtype), weight.requires_grad)
                module._parameters[name] = made.setdefault(id(weight), new)
                made[id(module._parameters[name])] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    mean = torch.empty(model.latent_shape, dtype=torch.float64)
    model.statistics.count, model.statistics.mean, model.statistics.m2 = 1, mean, mean
    model.statistics._by_device.clear()


def inputs_of(model: TextToImage, num: int, num_tokens: int) -> Inputs:
    """Inputs of a training's micro-batch, all of whose samples are conditioned."""
    requests = [Request(prompt_of(num_tokens, number)) for number in range(num)]
    shape = num, *model.latent_shape
    return {
        "request": model.conditioner.collate(requests, ["full"] * num, list(range(num))),
        "features": torch.empty(shape, dtype=torch.float16),
        "t": torch.empty(num),
        "noise": torch.empty(shape),
    }
