"""A mixture of data sets -> micro-batches, complete with captions and noise, read ahead by a thread."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from repfusion.data.dataset import Sample
from repfusion.data.mixture import Mixture
from repfusion.data.order import SampleOrder, hash64, sample_seed
from repfusion.data.readers import IMAGE_FEATURES, PROMPT_FEATURES
from repfusion.diffusion.flow import Draw, draw


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in page-locked memory where there is CUDA."""

    positions: list[int]
    """In the whole training: sample i of step s is at s * global_batch_size + i."""
    keys: list[str]
    """Those of a data set of the mix as `name/key`."""
    datasets: list[str]
    epochs: list[int]
    """Of each sample's data set."""
    captions: list[str]
    features: Float[Tensor, "b n d"]
    """As they lie on disk; mostly float16."""
    text: list[Tensor] | None
    """[m, d] precomputed prompt features of each caption, unpadded."""
    draws: Draw


def draw_caption(sample: Sample, weights: Mapping[str, float], seed: int) -> tuple[str, str]:
    """Name and text of the caption that a sample is seen with: a name by weight, then one of its variants,
    all alike. Decided by the sample's seed alone.
    """
    names = list(sample.captions)
    if len(names) == 1 and len(sample.captions[names[0]]) == 1:
        return names[0], sample.captions[names[0]][0]
    variant, fraction = divmod(hash64("caption", seed), 2**32)
    bounds = list(accumulate(weights[name] for name in names))
    name = names[bisect_right(bounds[:-1], fraction / 2**32 * bounds[-1])]
    return name, sample.captions[name][variant % len(sample.captions[name])]


def make_batch(
    mixture: Mixture,
    order: SampleOrder,
    positions: list[int],
    shift: float,
    condition_dropout: float,
    pin_memory: bool = False,
) -> Batch:
    shape, kind = mixture.forms[IMAGE_FEATURES]
    dtype = torch.from_numpy(np.empty(0, kind)).dtype
    features = torch.empty(len(positions), *shape, dtype=dtype, pin_memory=pin_memory)
    rows = features.numpy()
    places = [order.at(position) for position in positions]
    keys, seeds, captions, text = [], [], [], []
    for place, row in zip(places, rows, strict=True):
        dataset = mixture.datasets[place.dataset]
        sample = dataset[place.index]
        seed = sample_seed(order.seed, place.dataset, place.epoch, sample.key)
        name, caption = draw_caption(sample, dataset.weights, seed)
        row[:] = sample.read(IMAGE_FEATURES)
        keys.append(mixture.label(place.dataset, sample.key))
        seeds.append(seed)
        captions.append(caption)
        if (array := sample.read(PROMPT_FEATURES, name)) is not None:
            copy = torch.tensor(array)
            text.append(copy.pin_memory() if pin_memory else copy)
    return Batch(
        positions,
        keys,
        [place.dataset for place in places],
        [place.epoch for place in places],
        captions,
        features,
        text or None,
        draw(seeds, shape, shift, condition_dropout, pin_memory),
    )


def micro_positions(
    step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Positions of one step's micro-batches on this rank: a contiguous slice of the global batch, cut into
    equal parts.
    """
    per_rank = global_batch_size // world_size
    first = step * global_batch_size + rank * per_rank
    return [
        list(range(start, start + micro_batch_size))
        for start in range(first, first + per_rank, micro_batch_size)
    ]


def batches(
    mixture: Mixture,
    *,
    seed: int,
    shift: float,
    condition_dropout: float,
    first_step: int,
    num_steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch_steps: int = 2,
) -> Iterator[list[Batch]]:
    """The micro-batches of steps `first_step` to `num_steps` (exclusive), up to `prefetch_steps` read ahead.

    Sample i of step s has position s * global_batch_size + i whatever the world size or the micro-batches,
    and `SampleOrder` says what it reads: a run may stop and continue at any step, on any number of ranks, and
    sees the same samples with the same captions and noise.

    Raises:
        ValueError: the sizes do not divide; a sample cannot be read, at the step that needs it.
    """
    if micro_batch_size * world_size > global_batch_size or global_batch_size % (
        micro_batch_size * world_size
    ):
        raise ValueError(f"{micro_batch_size=} x {world_size=} must divide {global_batch_size=}")
    order, pin_memory = mixture.order(seed), torch.cuda.is_available()
    # the current device is a thread's own; without it every rank would open a context on the first GPU
    device = torch.cuda.current_device() if pin_memory else None

    def read(step: int) -> list[Batch]:
        parts = micro_positions(step, global_batch_size, micro_batch_size, rank, world_size)
        return [make_batch(mixture, order, part, shift, condition_dropout, pin_memory) for part in parts]

    def use_device() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    executor = ThreadPoolExecutor(1, "read_ahead", use_device)
    ahead: deque[Future[list[Batch]]] = deque()
    try:
        for step in range(first_step, num_steps):
            last = min(num_steps, step + 1 + prefetch_steps)
            ahead.extend(executor.submit(read, one) for one in range(step + len(ahead), last))
            yield ahead.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
