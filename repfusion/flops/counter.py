"""A model -> its twin without memory, and the FLOPs of what the twin does, by part: torch's FlopCounterMode
over the real code, forward and backward, on torch's meta device.

Of layers that are alike the first is run and the others are skipped: each costs what the first one does.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from repfusion.inputs import map_tensors
from repfusion.llm.kept import KeptLayer

Number = int | float | Fraction
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """FLOPs forward and backward."""

    forward: Number = 0
    backward: Number = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __rmul__(self, times: Number) -> "Cost":
        return Cost(times * self.forward, times * self.backward)

    @property
    def total(self) -> Number:
        """FLOPs of both directions."""
        return self.forward + self.backward


@dataclass(eq=False)
class LayerCall:
    """One layer on inputs of one form, as it was run; `times` counts the calls that it stands for."""

    layer: nn.Module
    outputs: Any = None
    times: int = 1


@dataclass(frozen=True)
class Label:
    """Where FLOPs are booked."""

    part: str
    call: LayerCall | None = None
    is_backward: bool = False


class PartTracker:
    """Which part is at work: what FlopCounterMode asks torch's ModuleTracker, which is lost in the backward
    pass of modules whose inputs take no gradient. Here the number that autograd gives each operation in the
    forward pass tells whose gradient is computed.

    Args:
        parts: modules by the name of the part that they and their submodules belong to; of nested ones the
            later counts.
        rest: the part of what happens in no such module.
    """

    def __init__(self, parts: Mapping[str, nn.Module], rest: str):
        self.owners = {id(module): name for name, part in parts.items() for module in part.modules()}
        self.stack = [rest]
        self.call: LayerCall | None = None
        self.starts: list[int] = []
        self.labels: list[Label] = []

    @property
    def parents(self) -> set[Label]:
        """Where the operation at hand is booked."""
        node = torch._C._current_autograd_node()
        if node is None:
            return {Label(self.stack[-1], self.call)}
        made = self.labels[bisect_right(self.starts, node._sequence_nr()) - 1]
        return {Label(made.part, made.call, is_backward=True)}

    def mark(self) -> None:
        """Notes who makes the autograd nodes from now on."""
        self.starts.append(torch.autograd._get_sequence_nr())
        self.labels.append(Label(self.stack[-1], self.call))

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A module begins."""
        self.stack.append(self.owners.get(id(module), self.stack[-1]))
        self.mark()

    def leave(self, *_: Any) -> None:
        """A module ends."""
        self.stack.pop()
        self.mark()

    def __enter__(self) -> None:
        self.mark()
        hooks = register_module_forward_pre_hook(self.enter), register_module_forward_hook(self.leave)
        self.hooks = hooks

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


class Skipped(torch.autograd.Function):
    """Outputs of the given forms that hang on the inputs, without any work between them."""

    @staticmethod
    def forward(ctx: Any, forms: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.inputs = [one.detach() for one in inputs]
        return tuple(torch.empty_like(form) for form in forms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.inputs


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)
    return found


def form(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides the cost of working with it."""
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad and torch.is_grad_enabled()


def kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that do the same: of one class, with settings and weights of the same form."""
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, str | bool)}
    weights = {name: form(weight) for name, weight in layer.named_parameters()}
    return type(layer), *settings.items(), *weights.items()


class Layers:
    """Runs of the layers of a model those that differ from all before them in the same pass."""

    def __init__(self, layers: list[nn.Module], tracker: PartTracker):
        self.kinds = {id(layer): kind(layer) for layer in layers}
        self.tracker = tracker
        self.seen: dict[Any, LayerCall] = {}
        self.passed: set[int] = set()
        for layer in layers:
            layer.forward = partial(self.run, layer, layer.forward)

    def run(self, layer: nn.Module, forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The outputs of a layer, or what has their form. A layer that is called once more begins another
        pass, in which a cache may hold more.
        """
        if id(layer) in self.passed:
            self.passed, self.seen = set(), {}
        self.passed.add(id(layer))
        inputs = tensors_in((args, kwargs))
        asked = (value for value in (*args, *kwargs.values()) if isinstance(value, bool))
        key = self.kinds[id(layer)], *map(form, inputs), *asked
        if (call := self.seen.get(key)) is None:
            call = self.seen[key] = LayerCall(layer)
            outputs = self.book(call, partial(forward, *args, **kwargs))
            call.outputs = map_tensors(outputs, Tensor.detach)
            return outputs
        call.times += 1
        if (cache := kwargs.get("past_key_values")) is not None:
            keep_alike(cache, call.layer, layer)
        weights = [one for one in layer.parameters() if one.requires_grad]
        behind = [*(one for one in inputs if one.requires_grad), *weights[:1]]
        made = iter(Skipped.apply(tensors_in(call.outputs), *behind))
        return map_tensors(call.outputs, lambda _: next(made))

    def book(self, call: LayerCall, work: Callable[[], T]) -> T:
        """Books what the work costs, then and in the backward pass, to the call."""
        outer, self.tracker.call = self.tracker.call, call
        outputs = work()
        self.tracker.call = outer
        self.tracker.mark()
        return outputs


class WithoutMemory(TorchFunctionMode):
    """Copies of tensors have their form alone, wherever in a model they lie, and what values would decide is
    decided as where a model is traced: nothing is left out.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), bare(tensor))
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def keep_alike(cache: Any, first: nn.Module, layer: nn.Module) -> None:
    """Puts into a cache of transformers what a layer that is skipped would keep: what the first, which is
    alike, has kept.
    """
    source, index = place_in_cache(first), place_in_cache(layer)
    if isinstance(cache.layers[source], KeptLayer):
        return  # it keeps nothing of what is read after the prompts
    new = cache.get_seq_length(source) - cache.get_seq_length(index)
    kept = cache.layers[source]
    cache.update(kept.keys[:, :, -new:], kept.values[:, :, -new:], index)


def place_in_cache(layer: nn.Module) -> int:
    """The number under which a layer of transformers keeps its keys and values."""
    return next(one.layer_idx for one in cast(Any, layer.modules()) if hasattr(one, "layer_idx"))


class Twin(Generic[M]):
    """A copy of a model whose tensors have shapes and no memory; the model itself is not touched. Layers that
    it compiles or whose activations it computes again do neither in the copy.

    Args:
        model: on any device, meta included.
        instead: what the copy has in the place of objects that the model has, by their `id`.
    """

    def __init__(self, model: M, instead: Mapping[int, object] = {}):
        weights = {id(weight): bare(weight) for weight in model.parameters()}
        with WithoutMemory():
            self.model: M = copy.deepcopy(model, {**weights, **instead})
        for module in self.model.modules():
            vars(module).pop("forward", None)
            module._compiled_call_impl = None

    def costs(
        self,
        work: Callable[[M], T],
        parts: Mapping[str, nn.Module],
        rest: str,
        layers: list[nn.Module] | None = None,
    ) -> tuple[T, dict[str, Cost]]:
        """What the work returns, and its cost by part; the CPU's attention is counted as two products.

        Args:
            work: of the model without memory; its inputs come from `inputs`.
            parts: modules of `model` by the name of their part.
            rest: the name of the part of everything else.
            layers: those of which one stands for all that are alike; None runs all.
        """
        tracker, counter = PartTracker(parts, rest), FlopCounterMode(display=False)
        counter.mod_tracker = cast(ModuleTracker, tracker)
        Layers(layers or [], tracker)
        with torch.device("meta"), WithoutMemory(), sdpa_kernel(SDPBackend.MATH), counter:
            result = work(self.model)
        for layer in layers or []:
            del layer.forward
        return result, booked(cast(dict[Label, dict[Any, int]], counter.flop_counts), (*parts, rest))

    def inputs(self, inputs: T) -> T:
        """Inputs without memory."""
        return map_tensors(inputs, bare)


def bare(tensor: Tensor) -> Tensor:
    """A tensor of the same form without memory."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    is_weight = isinstance(tensor, nn.Parameter)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made


def booked(counts: Mapping[Label, Mapping[Any, int]], parts: tuple[str, ...]) -> dict[str, Cost]:
    """FLOPs by part, each layer as often as it was called or skipped."""
    costs = dict.fromkeys(parts, Cost())
    for label, by_operation in counts.items():
        flops = sum(by_operation.values()) * (1 if label.call is None else label.call.times)
        costs[label.part] += Cost(0, flops) if label.is_backward else Cost(flops)
    return costs
