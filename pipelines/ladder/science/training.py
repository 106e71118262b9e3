"""A model and its feed -> averaged weights, in one plain loop that goes on where it was cut off.

Nothing in the loop waits for the device but a report now and then.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.ladder.science.feed import Feed
from pipelines.ladder.science.plan import SciencePlan
from repfusion.files import atomic_path
from repfusion.foundation.deadline import OutOfTime, has_come
from repfusion.foundation.optimise import put_back, training_tensors
from repfusion.model.text_to_image import TextToImage
from repfusion.training.ema import EMA
from repfusion.training.engine import NonFiniteError, learning_rate, trainable_parameters

NUM_REPORTS = 20
"""Points of a training's loss curve."""
SAVE_EVERY_SEC = 120.0
LOSS_SUM = "loss_sum"


@dataclass
class Progress:
    """How far a training is, as JSON holds it."""

    plan: str
    """Digest of the plan that it follows."""
    step: int = 0
    seconds: float = 0.0
    """Spent in steps, in all calls together."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Mean velocity losses of the steps up to each."""
    half: dict[str, Any] | None = None
    """What was found with the averaged weights of the middle."""


class Training:
    """A model, its optimizer and averages, and how far they are.

    Args:
        model: on the device; what requires gradients is trained.
        feed: its inputs.
        plan: steps, learning rate and averaging.
        seed: decides what the feed draws.
        state: file from which it goes on, and which is written where it is cut off.

    Raises:
        ValueError: the file is of another training.
    """

    def __init__(self, model: TextToImage, feed: Feed, plan: SciencePlan, seed: int, state: Path):
        self.model, self.feed, self.plan, self.seed, self.state = model, feed, plan, seed, state
        self.named = trainable_parameters(model)
        groups = [
            {"params": [p for p in self.named.values() if p.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.engine.betas, fused=True)
        self.ema = EMA(list(self.named.values()), plan.ema_decay)
        self.loss_sum = torch.zeros((), device=model.device)
        self.progress = Progress(plan.digest)
        self.lap_began = time.monotonic()
        if state.is_file():
            self._restore()

    def run(self, at_half: Callable[[], dict[str, Any]], until: float | None = None) -> Progress:
        """Trains to the end. `at_half` is called with the averaged weights of the middle in the model.

        Raises:
            OutOfTime: the deadline came first; the state is kept, at least a step further.
            NonFiniteError: the loss of some step since the last report was not finite.
        """
        progress, num_steps = self.progress, self.plan.num_steps
        every, half = max(1, num_steps // NUM_REPORTS), max(1, num_steps // 2)
        saved_at = self.lap_began = time.monotonic()
        while progress.step < num_steps:
            self.one_step(progress.step)
            progress.step += 1
            if progress.step % every == 0 or progress.step == num_steps:
                self._report()
            if progress.step == half:
                self._lap()
                with self.averaged():
                    progress.half = at_half()
                self.lap_began = time.monotonic()
            is_out = has_come(until) and progress.step < num_steps
            if is_out or time.monotonic() - saved_at > SAVE_EVERY_SEC:
                self._lap()
                self.keep()
                saved_at = self.lap_began = time.monotonic()
            if is_out:
                raise OutOfTime(f"{self.state.stem}: {progress.step} of {num_steps} steps are done")
        self._lap()
        return progress

    def _lap(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.lap_began
        self.lap_began = now

    def one_step(self, step: int) -> None:
        """Forward, backward, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan.engine, step, self.plan.num_steps)
        with attention(self.model.device), autocast(self.model.device):
            losses = self.model(self.feed.inputs(self.seed, step))
            means = [one.float().mean() for one in losses.values()]
        reduce(torch.add, means).backward()
        nn.utils.clip_grad_norm_(self.named.values(), self.plan.engine.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        self.loss_sum += means[0].detach()

    def _report(self) -> None:
        progress = self.progress
        before = progress.curve[-1][0] if progress.curve else 0
        loss = self.loss_sum.item() / (progress.step - before)
        if not math.isfinite(loss):
            raise NonFiniteError(f"{self.state.stem}: loss {loss} in steps {before + 1} to {progress.step}")
        progress.curve.append((progress.step, loss))
        self.loss_sum.zero_()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model, for the length of the block."""
        own = [p.detach().clone() for p in self.named.values()]
        self._put(self.ema.averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.named.values(), values, strict=True):
            parameter.copy_(value)

    def averages(self) -> dict[str, Tensor]:
        """Averaged weights by name."""
        return dict(zip(self.named, self.ema.averages, strict=True))

    def keep(self) -> None:
        """Writes the state, whole or not at all."""
        tensors = training_tensors(self.named, self.optimizer)
        tensors |= {f"average/{name}": one.cpu().contiguous() for name, one in self.averages().items()}
        tensors[LOSS_SUM] = self.loss_sum.cpu()
        with atomic_path(self.state) as temporary:
            save_file(tensors, str(temporary), {"progress": json.dumps(asdict(self.progress))})

    @torch.no_grad()
    def _restore(self) -> None:
        with safe_open(str(self.state), "pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        shapes = {name: p.shape for name, p in self.named.items()}
        kept = {n.removeprefix("weight/"): v.shape for n, v in tensors.items() if n.startswith("weight/")}
        if progress.plan != self.plan.digest or shapes != kept:
            raise ValueError(
                f"{self.state}: the state of another training; remove it, or choose another --out"
            )
        put_back(self.named, self.optimizer, tensors, progress.step)
        for name, average in self.averages().items():
            average.copy_(tensors[f"average/{name}"])
        self.loss_sum.copy_(tensors[LOSS_SUM])
        progress.curve = [(step, loss) for step, loss in progress.curve]
        self.progress = progress


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def attention(device: torch.device) -> Any:
    """The CPU's flash attention is slow in the backward pass of short sequences; the plain one is faster."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
