"""A loss -> trained weights: AdamW on a cosine, in bfloat16 autocast, from where it was cut off."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from repfusion.devices.compiling import compilation_for
from repfusion.devices.placing import multiplies_bf16
from repfusion.foundation.config import LengthConfig
from repfusion.foundation.deadline import OutOfTime, has_come

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 200
MAX_GRAD_NORM = 1.0
COST_OF_EAGER = "A step takes 2.2 times as long so: measured on two CPU cores"
SMOOTHING = 0.02
"""Share of the newest step in the losses that are shown."""


@runtime_checkable
class Course(Protocol):
    """How a training is run, beside what it learns."""

    @property
    def compile(self) -> bool:
        """Whether the loss is compiled."""
        ...

    @property
    def save_every_sec(self) -> float:
        """How often the state is written."""
        ...


@dataclass(frozen=True)
class Objective:
    """What a step learns, in two halves; the second is a function of tensors alone, so it can be compiled."""

    draw: Callable[[int], tuple[Tensor, ...]]
    """Step -> the tensors that the loss takes, of the same shapes at every step; all that is random follows
    from the step's number.
    """
    loss: Callable[..., Mapping[str, Tensor]]
    """Drawn tensors -> weighted parts of the loss, by name."""

    def __call__(self, step: int) -> Mapping[str, Tensor]:
        return self.loss(*self.draw(step))


def optimise(
    module: nn.Module,
    length: LengthConfig,
    objective: Objective,
    state: Path,
    config: Course,
    until: float | None = None,
) -> dict[str, float]:
    """Trains what requires gradients of a module and returns the smoothed parts of its loss.

    Weights, moments and the step are kept in the file `state` now and then; where it exists, training goes on
    from it. The configuration says how often, and whether the loss is compiled. `until` is a deadline, in
    seconds of `time.monotonic`.

    Raises:
        ValueError: the file holds another module's state, or a longer training's.
        OutOfTime: the deadline came; the file holds the state of all steps so far, one more than before.
        RuntimeError: the loss is not finite; the file holds the state of some steps before.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    device = next(iter(named.values())).device
    optimizer = adamw(named, length.lr)
    first, shown = restore(named, optimizer, length, state) if state.is_file() else (0, {})
    if config.compile:
        compilation = compilation_for(device.type, "the loss of a step", COST_OF_EAGER, dynamic=False)
        objective = Objective(objective.draw, compilation(objective.loss))
    saved_at = time.monotonic()
    bar = tqdm(range(first, length.num_steps), desc=state.stem, mininterval=10, initial=first)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = length.lr * rate(step, length.num_steps)
        with forward_pass(device):
            parts = objective(step)
            loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == length.num_steps:
            found = {name: part.item() for name, part in parts.items()}
            if not np.isfinite(list(found.values())).all():
                raise RuntimeError(f"{state.stem}: loss {found} at step {step}")
            shown = smoothed(shown, found)
            bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
        is_last, is_out = step + 1 == length.num_steps, has_come(until)
        if not is_last and (is_out or time.monotonic() - saved_at > config.save_every_sec):
            keep_state(named, optimizer, step + 1, shown, state)
            saved_at = time.monotonic()
        if is_out and not is_last:
            raise OutOfTime(f"{state.stem}: {step + 1} of {length.num_steps} steps are done")
    keep_state(named, optimizer, length.num_steps, shown, state)
    return shown


def rate(step: int, num_steps: int, final: float = 0.0) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to the share `final`."""
    cosine = 0.5 + 0.5 * np.cos(np.pi * step / num_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS) * (final + (1 - final) * cosine)


def adamw(
    named: Mapping[str, nn.Parameter], lr: float, weight_decay: float = WEIGHT_DECAY
) -> torch.optim.AdamW:
    """The optimizer of parameters; those that are no matrices do not decay."""
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


@contextmanager
def forward_pass(device: torch.device) -> Iterator[None]:
    """How modules are run in training: in bfloat16 where the device multiplies in it, and on a CPU with plain
    attention. The flash attention there is slow in the backward pass of short sequences; the plain one is
    1.5 x as fast.
    """
    backends = [SDPBackend.MATH] if device.type == "cpu" else [*SDPBackend.__members__.values()][1:]
    enabled = multiplies_bf16(device)
    with sdpa_kernel(backends), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


def smoothed(shown: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """The losses shown after those of one more of every 20 steps; a loss that is new begins as it is."""
    keep = 1 - 20 * SMOOTHING
    return {name: keep * shown.get(name, value) + (1 - keep) * value for name, value in found.items()}


def keep_state(
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    shown: Mapping[str, float],
    path: Path,
) -> None:
    """Writes weights, moments, the next step and the losses shown, whole or not at all."""
    tensors = {"step": torch.tensor(step)}
    tensors |= {f"loss/{name}": torch.tensor(value, dtype=torch.float64) for name, value in shown.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors | training_tensors(named, optimizer), str(temporary))
    temporary.rename(path)


MOMENTS = ("exp_avg", "exp_avg_sq")


def training_tensors(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights and AdamW's moments, on the CPU."""
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in named.items()}
    for moment in MOMENTS:
        for name, parameter in named.items():
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    return tensors


@torch.no_grad()
def put_back(
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """What `training_tensors` took, after `step` steps."""
    for name, parameter in named.items():
        parameter.copy_(tensors[f"weight/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),
            **{moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS},
        }


def restore(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, length: LengthConfig, path: Path
) -> tuple[int, dict[str, float]]:
    """Puts back what `keep_state` wrote; returns the next step and the losses shown."""
    tensors = load_file(str(path))
    own = {f"weight/{name}": p.shape for name, p in named.items()}
    kept = {name: value.shape for name, value in tensors.items() if name.startswith("weight/")}
    step = int(tensors["step"])
    if own != kept or step > length.num_steps:
        raise ValueError(
            f"{path}: state of another training (step {step} of {length.num_steps}, "
            f"{len(own.items() ^ kept.items())} weights differ); remove it, or train as before"
        )
    put_back(named, optimizer, tensors, step)
    shown = {name[5:]: value.item() for name, value in tensors.items() if name.startswith("loss/")}
    return step, shown
