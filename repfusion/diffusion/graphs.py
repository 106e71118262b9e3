"""A model's step -> one CUDA graph for each size of its inputs: what a step launches becomes a single call,
and its inputs are copied to where the graph reads them.

A CPU has no graphs: there the function is called on the same copies, which is how tests compare the two ways.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from repfusion.inputs import map_tensors

log = logging.getLogger(__name__)
Step = Callable[[Tensor, Tensor, Any], Tensor]
"""(noisy latents [b, n, d], noise levels [b], what is kept of the prompts) -> velocity [b, n, d]."""
MAX_GRAPHS = 8
"""Sizes whose graphs are kept; the one that was not used for longest makes room."""
WARMUP = 2
"""Calls before a capture: kernels are compiled and chosen, workspaces allocated."""


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, look)
    return found


class StepGraphs:
    """A step's function as graphs; it is called as the function is, without gradients.

    Args:
        step: launches the same kernels whatever the values of its inputs are, and waits for none of them.
    """

    def __init__(self, step: Step):
        self.step = step
        self.captured: OrderedDict[Any, CapturedStep] = OrderedDict()
        self.is_plain = False
        """Whether a capture failed, so that the function is called as it is."""

    def __call__(self, z_t: Tensor, t: Tensor, prompted: Any) -> Tensor:
        """Velocity, in memory of its own."""
        if self.is_plain:
            return self.step(z_t, t, prompted)
        autocast = torch.is_autocast_enabled(z_t.device.type)
        inputs = tensors_of((z_t, t, prompted))
        key = (autocast, *((one.shape, one.dtype, one.device) for one in inputs))
        if key not in self.captured:
            try:
                made = CapturedStep(self.step, z_t, t, prompted)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.is_plain = True
                said = "the step cannot be captured as a CUDA graph and is launched kernel by kernel: %s"
                log.warning(said, error)
                return self.step(z_t, t, prompted)
            while len(self.captured) >= MAX_GRAPHS:
                self.captured.popitem(last=False)
            self.captured[key] = made
        self.captured.move_to_end(key)
        return self.captured[key](z_t, t, prompted)


class CapturedStep:
    """One graph and the memory that it reads and writes."""

    def __init__(self, step: Step, z_t: Tensor, t: Tensor, prompted: Any):
        self.step, self.prompted = step, prompted
        self.inputs = map_tensors((z_t, t, prompted), torch.clone)
        self.places = tensors_of(self.inputs[2])
        self.graph: torch.cuda.CUDAGraph | None = None
        if z_t.is_cuda:
            self.made = self._capture(z_t.device)

    def __call__(self, z_t: Tensor, t: Tensor, prompted: Any) -> Tensor:
        self.inputs[0].copy_(z_t)
        self.inputs[1].copy_(t)
        if prompted is not self.prompted:  # the same through all steps of a batch
            for place, value in zip(self.places, tensors_of(prompted), strict=True):
                place.copy_(value)
            self.prompted = prompted
        if self.graph is None:
            return self._run().clone()
        self.graph.replay()
        return self.made.clone()

    def _run(self) -> Tensor:
        device_type = self.inputs[0].device.type
        # a cast that autocast keeps dies with its region, and a graph would read on where it lay
        dtype, is_on = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        uncached = torch.autocast(device_type, dtype, cache_enabled=False) if is_on else nullcontext()
        with torch.no_grad(), uncached:
            return self.step(*self.inputs)

    def _capture(self, device: torch.device) -> Tensor:
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                self._run()
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # what other threads do meanwhile, such as copying a batch, is no part of it
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            return self._run()
