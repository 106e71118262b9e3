"""Inputs of a forward pass: nested containers of tensors, pinned and copied to a device as a whole."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""Tensors, and lists, tuples, dicts and dataclasses of them, beside values that stay as they are."""
T = TypeVar("T")


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Nested containers like the given ones, with every tensor changed."""
    found: Any = value
    match value:
        case Tensor():
            found = change(value)
        case Mapping():
            found = {key: map_tensors(part, change) for key, part in value.items()}
        case tuple() if hasattr(value, "_fields"):  # a NamedTuple
            found = type(value)(*(map_tensors(part, change) for part in value))
        case list() | tuple():
            found = type(value)(map_tensors(part, change) for part in value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in fields(value) if field.init]
            found = type(value)(**{name: map_tensors(getattr(value, name), change) for name in names})
    return found


def to_device(inputs: T, device: torch.device) -> T:
    """Copies to a device, without waiting where the source is in page-locked memory."""
    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def pin(inputs: T) -> T:
    """Page-locked copies of what is not in page-locked memory yet, where there is CUDA."""
    if not torch.cuda.is_available():
        return inputs
    return map_tensors(inputs, lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor on the CPU, in page-locked memory where there is CUDA."""
    return torch.empty(*shape, dtype=dtype, pin_memory=torch.cuda.is_available())
