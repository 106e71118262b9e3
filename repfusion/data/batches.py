"""A mixture of data sets -> micro-batches of a model's inputs, read ahead by a thread."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from repfusion.data.dataset import Sample
from repfusion.data.mixture import Mixture
from repfusion.data.order import SampleOrder, sample_seed
from repfusion.data.recipe import Recipe
from repfusion.inputs import Inputs, pin


@dataclass(frozen=True)
class Batch:
    """One micro-batch, in page-locked memory where there is CUDA."""

    positions: list[int]
    """Places in the whole training: sample i of step s is at s * global_batch_size + i."""
    keys: list[str]
    """Keys of the samples; those of a data set of the mix as `name/key`."""
    datasets: list[str]
    """Data set of each sample."""
    epochs: list[int]
    """Epoch of each sample's data set."""
    inputs: Inputs
    """What the model's forward pass takes, on the CPU."""


Collate = Callable[[Sequence[Sample], Recipe, Sequence[int]], Inputs]
"""A model's `collate`: (samples, recipe, seeds) -> inputs."""


def make_batch(
    mixture: Mixture, order: SampleOrder, positions: list[int], recipe: Recipe, collate: Collate
) -> Batch:
    """The micro-batch at these positions of a training."""
    places = [order.at(position) for position in positions]
    samples = [mixture.datasets[place.dataset][place.index] for place in places]
    pairs = list(zip(places, samples, strict=True))
    seeds = [sample_seed(order.seed, place.dataset, place.epoch, sample.key) for place, sample in pairs]
    return Batch(
        positions,
        [mixture.label(place.dataset, sample.key) for place, sample in pairs],
        [place.dataset for place in places],
        [place.epoch for place in places],
        pin(collate(samples, recipe, seeds)),
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
    recipe: Recipe,
    collate: Collate,
    *,
    seed: int,
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
    order = mixture.order(seed)
    # the current device is a thread's own; without it every rank would open a context on the first GPU
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def read(step: int) -> list[Batch]:
        parts = micro_positions(step, global_batch_size, micro_batch_size, rank, world_size)
        return [make_batch(mixture, order, part, recipe, collate) for part in parts]

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
