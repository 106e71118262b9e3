"""Keys and values of prompts that are read once, for whatever is read after them, many times."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class KeptLayer(DynamicLayer):
    """Keys and values of the prompts in one layer. What is read after them sees them and is not kept: however
    often a layer runs, in sampling's steps or where its activations are computed again, it finds the same.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values with those of the tokens after them."""
        return OwnLayer(self.keys, self.values).update(key_states, value_states)


@dataclass(frozen=True)
class OwnLayer:
    """Kept keys and values as one layer sees them, whatever its number is: code that is compiled for a layer
    then serves all of them.
    """

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values with those of the tokens after them."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def with_own_layer(
    plain: Callable[..., Any], compiled: Callable[..., Any], number: int
) -> Callable[..., Any]:
    """The function of layer `number` of transformers: compiled, and given what is kept of prompts for this
    layer alone; as it is where it fills a cache, which would be compiled for each layer anew.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if (cache := kwargs.get("past_key_values")) is None:
            return compiled(*args, **kwargs)
        if not isinstance(own := cache.layers[number], KeptLayer):
            return plain(*args, **kwargs)
        return compiled(*args, **{**kwargs, "past_key_values": OwnLayer(own.keys, own.values)})

    return run


@dataclass(frozen=True)
class KeptPrompts:
    """Keys and values [b, h, m, e] of prompts, by layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, cache: Any, folder: Path) -> "KeptPrompts":
        """What a pass over the prompts left in a cache of transformers.

        Raises:
            ValueError: a layer keeps something else, such as a sliding window; `folder` is the model's.
        """
        for number, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"MLLM folder {folder}: layer {number} keeps a {type(layer).__name__}, and not all keys "
                    "and values of a prompt; choose a model whose attention is full in every layer"
                )
        return cls(tuple((layer.keys, layer.values) for layer in cache.layers))

    def cache(self) -> Cache:
        """The prompts as transformers' models read on from them."""
        made = DynamicCache()
        made.layers = [KeptLayer(keys, values) for keys, values in self.layers]
        return made
