"""What the training loop measures between two log lines: means over steps, ranks and noise levels."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from repfusion.training.engine import StepStats

NOISE_BUCKETS = 5
"""Equal ranges of the noise level t whose losses are told apart."""


@dataclass(frozen=True)
class Report:
    """What one log line says: means since the last one."""

    step: int
    loss: float
    other_losses: dict[str, float]
    """Weighted auxiliary losses, by name."""
    grad_norm: float
    lr: float
    samples_per_sec: float
    step_sec: float
    data_wait: float
    """Fraction of the time that the rank which waited longest waited for data."""
    memory_gib: float
    """Most that a rank ever used, of its GPU's memory; of the host's where there is none."""
    samples_seen: int
    """Since the start of the training."""
    epochs: float
    """samples_seen over the number of samples."""
    tflops: float
    """10^12 FLOPs per second of one rank, by the count of `repfusion.flops`."""
    mfu: float | None
    """tflops over the device's bfloat16 peak; None where that is unknown."""
    recompilations: int
    """Graphs that a rank compiled since its warm-up, at most; more than 0 says that sizes never settle."""
    loss_by_noise: dict[str, float]
    """Mean loss of the samples whose noise level lies in a range, such as "0.2-0.4"."""

    def metrics(self) -> dict[str, float]:
        """The report as MLflow names it: `train/loss`, `train/caption_loss`, `train/loss_at_t/0.0-0.2`,
        ...
        """
        values = {name: float(value) for name, value in vars(self).items() if isinstance(value, int | float)}
        values.pop("step")
        values |= {f"{name}_loss": value for name, value in self.other_losses.items()}
        by_noise = {f"train/loss_at_t/{name}": value for name, value in self.loss_by_noise.items()}
        return {f"train/{name}": value for name, value in values.items()} | by_noise


class Meters:
    """Collects on every rank; `report` is called by all of them.

    Args:
        samples_per_step: over all ranks.
        num_samples: in an epoch.
        flops_per_sample: of one rank, on the average over the ranks.
    """

    def __init__(
        self, device: torch.device, samples_per_step: int, num_samples: int, flops_per_sample: float
    ):
        self.device, self.samples_per_step, self.num_samples = device, samples_per_step, num_samples
        self.flops_per_sample = flops_per_sample
        self.clear()

    def clear(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.waited_sec = 0.0
        self.by_noise = torch.zeros(2, NOISE_BUCKETS, device=self.device)
        self.started = time.perf_counter()

    def add_step(self, stats: StepStats) -> None:
        """One update of all ranks."""
        self.losses.append(stats.losses)

    def add_losses(self, t: Float[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """A micro-batch of this rank."""
        bucket = (t * NOISE_BUCKETS).long().clamp(max=NOISE_BUCKETS - 1)
        self.by_noise[0].index_add_(0, bucket, losses)
        self.by_noise[1].index_add_(0, bucket, torch.ones_like(losses))

    def set_aside(self, seconds: float) -> None:
        """Time that was not spent training."""
        self.started += seconds

    def report(
        self, step: int, stats: StepStats, peak_flops: float | None, recompilations: int = 0
    ) -> Report:
        """What was collected since the last one, which is then forgotten."""
        seconds = time.perf_counter() - self.started
        memory_gib = memory_bytes(self.device) / 2**30
        worst = torch.tensor([self.waited_sec, memory_gib, recompilations], device=self.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        dist.all_reduce(self.by_noise)
        sums, counts = self.by_noise.tolist()
        waited_sec, memory_gib, recompilations = worst.tolist()
        num_steps = len(self.losses)
        loss, *others = (
            (name, sum(step[name] for step in self.losses) / num_steps) for name in self.losses[0]
        )
        samples_per_sec = num_steps * self.samples_per_step / seconds
        flops_per_sec = samples_per_sec * self.flops_per_sample
        report = Report(
            step=step,
            loss=loss[1],
            other_losses=dict(others),
            grad_norm=stats.grad_norm,
            lr=stats.lr,
            samples_per_sec=samples_per_sec,
            step_sec=seconds / num_steps,
            data_wait=waited_sec / seconds,
            memory_gib=memory_gib,
            samples_seen=step * self.samples_per_step,
            epochs=step * self.samples_per_step / self.num_samples,
            tflops=flops_per_sec / 1e12,
            mfu=None if peak_flops is None else flops_per_sec / peak_flops,
            recompilations=int(recompilations),
            loss_by_noise={
                f"{i / NOISE_BUCKETS:.1f}-{(i + 1) / NOISE_BUCKETS:.1f}": total / count
                for i, (total, count) in enumerate(zip(sums, counts, strict=True))
                if count
            },
        )
        self.clear()
        return report


def memory_bytes(device: torch.device) -> int:
    """Most that this process ever used, on its GPU or on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
