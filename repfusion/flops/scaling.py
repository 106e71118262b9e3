"""FLOPs, bytes and link rates -> the expected time of a training step on many GPUs; docs/scaling.md explains
it.

Collectives are rings: of `num_bytes` that N ranks hold together, each sends and receives (N - 1) / N over its
slowest link.
"""

from dataclasses import dataclass

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU sends to its neighbour in a ring."""

    within_node: float = 450e9
    """NVLink 4: 18 links of 25 GB/s in each direction."""
    between_nodes: float = 50e9
    """A 400 Gb/s adapter for each GPU."""
    reached: float = 0.8
    """Share of it that large collectives reach. A guess: nothing here was measured on several GPUs."""
    gpus_per_node: int = 8

    def rate(self, num_gpus: int) -> float:
        """Bytes a second of a ring over so many GPUs."""
        slowest = self.within_node if num_gpus <= self.gpus_per_node else self.between_nodes
        return self.reached * slowest


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update on every rank."""

    compute: float
    """Forward and backward passes, at the share of the peak that one GPU reaches."""
    hidden: float
    """Communication that runs beside them."""
    exposed: float
    """Communication that nothing runs beside."""

    @property
    def total(self) -> float:
        """All of it: what is hidden costs where it takes longer than what hides it."""
        return max(self.compute, self.hidden) + self.exposed

    @property
    def efficiency(self) -> float:
        """What is left of one GPU's rate."""
        return self.compute / self.total


def step_time(
    flops_per_sample: float,
    samples_per_rank: int,
    flops_per_sec: float,
    num_trained: float,
    num_gpus: int,
    zero_stage: int = 2,
    micro_batches: int = 1,
    links: Links = Links(),
) -> StepTime:
    """The expected time of a step.

    Stage 1 averages float32 gradients beside the last backward pass, stage 2, which keeps a share of them,
    beside every one; both gather the updated weights after it. Stage 3 gathers the weights in every forward
    and every backward pass and scatters gradients in each, all of it beside the computation.

    Args:
        flops_per_sample: forward and backward (`train_flops`).
        samples_per_rank: of a step, in `micro_batches` passes.
        flops_per_sec: that one GPU reaches.
        num_trained: weights that are trained.
        num_gpus: ranks.
        zero_stage: 0 to 3.
    """
    compute = samples_per_rank * flops_per_sample / flops_per_sec
    if num_gpus == 1:
        return StepTime(compute, 0.0, 0.0)
    once = FLOAT32 * num_trained * (num_gpus - 1) / num_gpus / links.rate(num_gpus)
    match zero_stage:
        case 0:
            return StepTime(compute, 2 * once, 0.0)
        case 1:
            return StepTime(compute, once, once)
        case 2:
            return StepTime(compute, micro_batches * once, once)
        case _:
            return StepTime(compute, 3 * micro_batches * once, 0.0)
