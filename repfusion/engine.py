"""DeepSpeed around a module: micro-batch losses -> one optimizer update. The only file that imports
deepspeed.

Master weights are float32 throughout; "bf16" is autocast around the forward pass. DeepSpeed's own bf16 mode
would cast the weights.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class EngineConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_stage: Literal[0, 1, 2] = 2
    """What ZeRO shards over ranks: 0 nothing, 1 optimizer state, 2 gradients too."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.1
    """Applied to matrices; vectors (biases, norms) are left alone."""
    warmup_steps: int = 100
    """Linear warm-up from 0."""
    schedule: Literal["cosine", "constant", "trapezoid"] = "cosine"
    """After the warm-up: a cosine to min_lr_ratio * lr at the last step, constant, or constant with a linear
    end.

    The trapezoid does not depend on num_steps before its end, so a run may be prolonged or cut short from any
    checkpoint.
    """
    decay_steps: int = 0
    """Length of the trapezoid's linear end, from lr to min_lr_ratio * lr."""
    min_lr_ratio: float = 0.1
    """Final over peak learning rate of the cosine and of the trapezoid."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; None leaves it."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward and backward pass. Weights, optimizer and EMA are float32 in both."""
    micro_batch_size: int = 32
    """Samples per forward pass on one rank; gradient accumulation makes up the rest of the global batch."""
    attention: Literal["auto", "math", "torch"] = "auto"
    """SDPA backend. auto: math on CPU (1.5x there: the flash backward is slow on short sequences),
    torch's choice on GPU.
    """
    num_threads: int | None = None
    """Threads per worker on CPU; None divides the cores among the local workers."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite. Raised before the update, so the weights are those of the last
    good step.
    """


@dataclass(frozen=True)
class StepStats:
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per step on each rank. ValueError where the sizes do not divide."""
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"x {world_size} ranks = {per_pass}; change global_batch_size or engine.micro_batch_size"
        )
    return global_batch_size // per_pass


def learning_rate(config: EngineConfig, step: int, num_steps: int) -> float:
    """Learning rate of the update that follows `step` completed ones. A function of the step alone:
    nothing to save.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "trapezoid":
        left = min(1.0, (num_steps - step) / max(1, config.decay_steps))
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def deepspeed_config(
    config: EngineConfig, global_batch_size: int, world_size: int, num_trainable: int
) -> dict[str, Any]:
    """The JSON that DeepSpeed wants."""
    # Buckets are allocated whole: DeepSpeed's default of 5e8 elements takes 2 GB however small the model is.
    # It wants them even.
    bucket = min(num_trainable + num_trainable % 2, 500_000_000)
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps(
            global_batch_size, config.micro_batch_size, world_size
        ),
        "gradient_clipping": config.grad_clip or 0.0,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
        },
    }


def prepare_environment() -> None:
    """Environment that DeepSpeed and gloo read when first used; what the user set is kept."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed insists on a local rank, launcher or not.
    os.environ.setdefault("LOCAL_RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        # One machine: keep gloo off the network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def init_process_group() -> None:
    """Join the group that torchrun or Ray Train describes, or make one of a single process, which needs
    no port.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """DeepSpeed prints while it builds and loads its operator."""
    stdout = sys.stdout
    with open(os.devnull, "w") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout = stdout


class Forward(nn.Module):
    """The module as DeepSpeed calls it. Autocast is entered in here, since DeepSpeed's engine turns off
    any entered outside.
    """

    def __init__(self, module: nn.Module, precision: str, device: torch.device, math_attention: bool):
        super().__init__()
        self.module = module
        self.precision, self.device_type, self.math_attention = precision, device.type, math_attention

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, " b"]:
        attention = sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext()
        autocast = torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bf16")
        with attention, autocast:
            return self.module(*args, **kwargs)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Engine:
    """A module under DeepSpeed: `loss_of` micro-batches, then `update`.

    The module returns one loss per sample; the step's loss is their mean over the global batch, so N
    micro-batches equal one batch.

    Args:
        module: trains its parameters that require gradients; the others stay as they are (stored as bfloat16
            on a GPU).
        num_steps: length of the run, for the learning-rate schedule.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, global_batch_size: int, num_steps: int):
        prepare_environment()
        init_process_group()
        self.config, self.num_steps = config, num_steps
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(config.num_threads or max(1, num_cores() // workers))
        self.grad_accum_steps = grad_accum_steps(global_batch_size, config.micro_batch_size, self.world_size)
        self.module = module
        self.parameters = trainable_parameters(module)
        if not self.parameters:
            raise ValueError("the module has no parameter that requires a gradient")
        if self.device.type == "cuda" and config.precision == "bf16":
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        math_attention = config.attention == "math" or (
            config.attention == "auto" and self.device.type == "cpu"
        )
        self.deepspeed = self._initialize(
            Forward(module, config.precision, self.device, math_attention), global_batch_size
        )
        self.losses: list[Tensor] = []
        self.keys: list[str] = []

    def _initialize(self, forward: Forward, global_batch_size: int) -> Any:
        with quiet_stdout(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            # On CPU, DeepSpeed would compile a shared-memory operator on first use: a minute,
            # and a C++ compiler needed.
            # Only its inference all-reduce calls it; training goes through gloo.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            parameters = self.parameters.values()
            groups = [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.config.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=self.config.lr,
                betas=self.config.betas,
                fused=True,
            )
            num_trainable = sum(p.numel() for p in parameters)
            settings = deepspeed_config(self.config, global_batch_size, self.world_size, num_trainable)
            return deepspeed.initialize(model=forward, optimizer=optimizer, config=settings)[0]

    def accumulate(self, keys: list[str], **inputs: Any) -> Float[Tensor, " b"]:
        """Forward and backward of one micro-batch; returns its loss per sample. `keys` name the samples
        should one go wrong.
        """
        losses = self.deepspeed(**inputs).float()
        self.deepspeed.backward(losses.mean())
        self.losses.append(losses.detach())
        self.keys.extend(keys)
        if len(self.losses) < self.grad_accum_steps:
            self.deepspeed.step()  # counts the micro-batch; the update comes with the last one
        return losses.detach()

    def update(self, step: int) -> StepStats:
        """Clip and apply the gradient of the accumulated micro-batches.

        Raises:
            NonFiniteError: on every rank, before the weights change, with the step and the keys of the batch.
        """
        assert len(self.losses) == self.grad_accum_steps
        losses = torch.cat(self.losses)
        keys, self.losses, self.keys = self.keys, [], []
        # Every rank must take the same branch, or the others would wait for it in the next collective.
        mean = losses.mean()
        dist.all_reduce(mean)
        loss = float(mean) / self.world_size
        if not math.isfinite(loss):
            self._stop("loss", step, [k for k, bad in zip(keys, ~losses.isfinite(), strict=True) if bad])
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self.config.zero_stage == 0:
            # Without ZeRO, DeepSpeed would apply a gradient that is not finite.
            norm = float(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in self.parameters.values() if p.grad is not None]
                )
            )
            if not math.isfinite(norm):
                self._stop("gradient", step, keys)
            self.deepspeed.step()
        else:
            # ZeRO checks the norm first, on all ranks alike, and skips the update where it is not finite.
            self.deepspeed.step()
            if self.deepspeed.optimizer.overflow:
                self._stop("gradient", step, keys)
            norm = float(self.deepspeed.get_global_grad_norm())
        return StepStats(loss, norm, lr)

    def _stop(self, what: str, step: int, keys: list[str]) -> None:
        gathered: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, keys)
        names = [key for part in gathered for key in part]
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise NonFiniteError(
            f"step {step}: the {what} is not finite; the weights are unchanged. Samples: {shown}. Look at "
            "these samples, or lower engine.lr or engine.grad_clip, and resume from the last checkpoint"
        )

    def save(self, folder: Path) -> None:
        """Optimizer state and this rank's share of the master weights. Called by all ranks."""
        self.deepspeed.save_checkpoint(
            str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True
        )
        if self.rank == 0:
            for script in folder.glob("zero_to_*.py"):  # copies of DeepSpeed's conversion scripts
                script.unlink()

    def load(self, folder: Path) -> None:
        """Continue bit for bit from `save` at the same world size. Called by all ranks."""
        with quiet_stdout():
            path, _ = self.deepspeed.load_checkpoint(
                str(folder), tag="deepspeed", custom_load_fn=self._load_module
            )
        if path is None:
            raise ValueError(f"{folder}: no DeepSpeed state here; the checkpoint is incomplete")

    def _load_module(self, src: dict[str, Tensor], dst: nn.Module) -> None:
        missing, unexpected = dst.load_state_dict(src, strict=False)
        missing = [name for name in missing if name.removeprefix("module.") in self.parameters]
        if missing or unexpected:
            raise ValueError(
                f"resume state does not match the model: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )

    def barrier(self) -> None:
        dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


# DeepSpeed 0.19.8 calls names that torch 2.13 deprecates; nothing here can change that.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shut_down() -> None:
    """Leave the process group, for a process that started it itself."""
    if dist.is_initialized():
        dist.destroy_process_group()
