"""Batches of images or clips -> encodings, in the one thread that a worker's encoder has, of any shard.

On a GPU that thread only queues work: images come from page-locked memory, two streams take turns, and what
leaves is float16 features and the batch's statistics, summed there.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float16, UInt8
from torch import Tensor

from repfusion.devices.compiling import compilation_for
from repfusion.devices.placing import BatchRoom
from repfusion.inputs import map_tensors
from repfusion.latents.encoder import Encoding, FrozenEncoder
from repfusion.latents.statistics import LatentStatistics

Launched = tuple[Tensor, LatentStatistics | None, Any, Any]
"""Features, their statistics where they were summed up already, what of tokens a LayerNorm took, and the
event (of CUDA) at which all of that is there; None where it is there already.
"""
COST_OF_EAGER = "Encoding takes 1.2 times as long so: measured with CLIP-L/14 at 336 px on an H200"


@dataclass(frozen=True)
class Encoded:
    """A batch on its way; `images` stay until it is there."""

    images: UInt8[np.ndarray, "b *f h w 3"]
    parts: Sequence[Launched]

    def wait(self) -> tuple[Float16[Tensor, "b n d"], LatentStatistics]:
        """Features on the CPU, and the batch's statistics."""
        found = []
        for features, statistics, tokens, done in self.parts:
            if done is not None:
                done.synchronize()
            found.append((features, statistics or LatentStatistics.of(features, tokens)))
        merged = found[0][1]
        for _, further in found[1:]:
            merged.merge(further)
        return found[0][0] if len(found) == 1 else torch.cat([one for one, _ in found]), merged


class BatchEncoder:
    """Encodes batches of at most `batch_size` images, in one thread.

    Where sizes have to be static, which is where it compiles and on a GPU, the last batch of a shard is
    filled up, so that every image is encoded among as many others. A batch that does not fit into the
    device's memory is encoded in halves, and so are all after it.

    Args:
        encoder: on its device already.
        batch_size: images of a full batch.
        compiles: whether it is compiled.
        key: the configuration's field of the batch size, for what is said.
        num_threads: compute threads on a CPU.
    """

    def __init__(self, encoder: FrozenEncoder, batch_size: int, compiles: bool, key: str, num_threads: int):
        self.encoder, self.device = encoder, next(encoder.parameters()).device
        self._room = BatchRoom(batch_size, self.device, key)
        self.encode: Callable[[Tensor], Encoding] = encoder.encode_images
        is_gpu = self.device.type == "cuda"
        self.is_static = compiles or is_gpu
        if compiles:
            compilation = compilation_for(self.device.type, "the encoder", COST_OF_EAGER, dynamic=False)
            self.encode = compilation(encoder.encode_images)
        self._thread = ThreadPoolExecutor(1, "encode", torch.set_num_threads, (num_threads,))
        self._streams = itertools.cycle([torch.cuda.Stream(), torch.cuda.Stream()] if is_gpu else [None])
        if is_gpu:
            torch.cuda.synchronize()  # the weights lie there before other streams read them

    def submit(self, images: UInt8[np.ndarray, "b *f h w 3"]) -> Future[Encoded]:
        """The encoding of a batch, once it is queued."""
        return self._thread.submit(
            lambda: Encoded(images, self._room(self._launch, torch.from_numpy(images)))
        )

    def first_not_finite(self, image: UInt8[np.ndarray, "*f h w 3"]) -> str | None:
        """The first part of the encoder that makes of an image what is not finite."""
        batch = torch.from_numpy(image)[None].to(self.device)
        return self._thread.submit(self.encoder.first_not_finite, batch).result()

    def _launch(self, images: UInt8[Tensor, "b *f h w 3"]) -> Launched:
        stream, num = next(self._streams), len(images)
        filling = (0, 0) * (images.ndim - 1) + (0, self._room.most - num if self.is_static else 0)
        if stream is None:
            features, tokens = self._first(self.encode(F.pad(images, filling)), num)
            return features.half(), None, tokens, None
        with torch.cuda.stream(stream):
            # from and to page-locked memory, or the copies would hold up this thread
            on_device = F.pad(images.to(self.device, non_blocking=True), filling)
            features, tokens = self._first(self.encode(on_device), num)
            features = features.half()
            statistics = map_tensors(LatentStatistics.of(features, tokens), pinned)
            return pinned(features), statistics, None, stream.record_event()

    def _first(self, encoding: Encoding, num: int) -> Encoding:
        return map_tensors(encoding, lambda one: one[:num]) if self.is_static else encoding


def pinned(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory, there once the current stream has come so far."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
