"""DeepSpeed around a module: micro-batch losses -> one optimizer update. The only file that imports
deepspeed.

Master weights are float32 throughout; "bf16" is autocast around the forward pass. DeepSpeed's own bf16 mode
would cast the weights and keep masters beside them. What resuming needs is read and written by `partition`,
in place of DeepSpeed's checkpoints: those are pickles, hold the weights again, and want a conversion before
another number of ranks can read them.
"""

import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from repfusion.config import Config
from repfusion.devices.placing import Autocast, autocast_of, multiplies_bf16
from repfusion.training.distributed import gather_objects, init_process_group, num_cores, prepare_environment
from repfusion.training.partition import Partition

log = logging.getLogger(__name__)

Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of an average stays at a step."""


class EngineConfig(Config):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over ranks: 0 nothing, 1 optimizer state and averaged weights, 2 gradients too, 3 the
    trained weights too. On a single rank there is nothing to share out and 1 and 2 run as 0.
    """
    frozen: Literal["replicated", "sharded"] = "replicated"
    """Where the frozen MLLM lies under stage 3: whole on every rank, or shared out like the trained weights
    and gathered layer by layer in every pass.
    """
    offload_optimizer: bool = False
    """Keep optimizer state and master weights in the host's memory and update them there. Needs stage 1 to 3.
    """
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What activations of each block of the DiT and of the MLLM are computed again in the backward pass
    instead of being kept. selective: all but the results of matrix products and of attention, which is little
    work. full: all of them, about a third more work for a fraction of the memory.
    """
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the blocks of the DiT and the layers of the MLLM; auto: on a GPU. Where it cannot be done
    they run as they are, with a warning. Under stage 3 the weights of a layer are then gathered together.
    """
    reads_prompts_apart: bool = False
    """Read prompts before the noisy latents, with a frozen MLLM and without gradients, so that of them keys
    and values alone are kept. Worth it for long prompts: attention then takes a mask, which is slower than
    without.
    """
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices; vectors (biases, norms) are left alone."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear warm-up from 0."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: a cosine to min_lr_ratio * lr at the last step, constant, or
    warm-up-stable-decay: constant with a linear end.

    The latter does not depend on num_steps before its end, so a run may be prolonged or cut short from any
    checkpoint.
    """
    decay_steps: int = Field(default=0, ge=0)
    """Length of the linear end of wsd, from lr to min_lr_ratio * lr."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final over peak learning rate of cosine and wsd."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None leaves it."""
    precision: Literal["auto"] | Autocast = "auto"
    """Precision of the forward and backward pass; auto is bf16 where every rank's device multiplies in it,
    else fp32, and a resumed run keeps its own. Weights, optimizer and EMA are float32 in all.
    """
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples per forward pass on one rank; gradient accumulation makes up the rest of the global batch."""
    attention: Literal["auto", "math", "torch"] = "auto"
    """SDPA backend. auto: math on CPU (1.5x there: the flash backward is slow on short sequences),
    torch's choice on GPU.
    """
    num_threads: int | None = Field(default=None, ge=1)
    """Threads per worker on CPU; None divides the cores among the local workers."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "EngineConfig":
        if self.frozen == "sharded" and self.zero_stage != 3:
            raise ValueError(f"frozen: sharded needs zero_stage 3, it is {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; it is 0")
        return self

    def compiles(self, device_type: str) -> bool:
        """Whether layers are compiled on a device."""
        return device_type == "cuda" if self.compile == "auto" else self.compile


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite. Raised before the update, so the weights are those of the last
    good step.
    """


@dataclass(frozen=True)
class StepStats:
    losses: dict[str, float]
    """Mean over the global batch of each loss, by name; the first is the one that is reported as `loss`."""
    grad_norm: float
    """Before clipping."""
    lr: float
    stop: bool
    """Whether any rank was asked to stop."""

    @property
    def loss(self) -> float:
        """The first of the losses."""
        return next(iter(self.losses.values()))


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
    if config.schedule == "wsd":
        left = min(1.0, (num_steps - step) / max(1, config.decay_steps))
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def deepspeed_config(
    config: EngineConfig, stage: int, global_batch_size: int, world_size: int, num_trainable: int
) -> dict[str, Any]:
    """The JSON that DeepSpeed wants, for the ZeRO stage that is run."""
    # Buckets are allocated whole and several times over: DeepSpeed's default of 5e8 elements takes 2 GB each
    # however small the model is. It wants them even.
    bucket = min(num_trainable + num_trainable % 2, 100_000_000)
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps(
            global_batch_size, config.micro_batch_size, world_size
        ),
        # Without ZeRO the engine clips, by the norm that it needs anyhow.
        "gradient_clipping": config.grad_clip or 0.0 if stage else 0.0,
        "steps_per_print": None,
        # It would synchronise with the GPU at every pass and step.
        "timers": {"throughput": {"enabled": False}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
            **({"offload_optimizer": offload} if config.offload_optimizer else {}),
        },
    }


def stage_to_run(config: EngineConfig, world_size: int) -> int:
    """ZeRO's stage: on one rank 1 and 2 would copy every gradient into buckets for nobody."""
    is_idle = world_size == 1 and config.zero_stage in (1, 2) and not config.offload_optimizer
    return 0 if is_idle else config.zero_stage


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

    def __init__(self, module: nn.Module, precision: Autocast, device: torch.device):
        super().__init__()
        self.module = module
        self.precision, self.device_type = precision, device.type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(*args, **kwargs)


def agreed_precision(asked: Literal["auto"] | Autocast, device: torch.device) -> Autocast:
    """The precision of all ranks, that of the one whose device can do least. Called by all ranks."""
    found = gather_objects(autocast_of(asked, device))
    if asked == "bf16" and not multiplies_bf16(device):
        said = "engine.precision bf16: this %s has no products in bfloat16 and is many times slower; set fp32"
        log.warning(said, device.type.upper())
    return "fp32" if "fp32" in found else "bf16"


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def take_out(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Makes `parts` plain attributes of their parents: nothing that walks through the modules of `module`, as
    DeepSpeed does at every pass, meets them.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if any(child is part for part in parts):
                del parent._modules[name]
                parent.__dict__[name] = child


class Engine:
    """A module under DeepSpeed: `accumulate` micro-batches, then `update`.

    The module returns losses by name, one a sample, the same names in every micro-batch. What is minimised is
    the sum of their means over the global batch, so N micro-batches equal one batch; each mean is reported.

    Args:
        module: trains its parameters that require gradients, from the values they have now; the others stay
            as they are (stored as bfloat16 on a GPU).
        num_steps: length of the run, for the learning-rate schedule.
        frozen: parts without trained parameters. Unless `config.frozen` is sharded they are taken out of the
            module: DeepSpeed leaves them alone.
        layers: parts of the module that are compiled. Under stage 3 each has all of its weights gathered
            before it runs, since what is compiled cannot wait for them within.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        global_batch_size: int,
        num_steps: int,
        frozen: Sequence[nn.Module] = (),
        layers: Sequence[nn.Module] = (),
    ):
        prepare_environment()
        init_process_group()
        self.config, self.num_steps = config, num_steps
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            if local_rank >= (num := torch.cuda.device_count()):
                raise ValueError(
                    f"rank {self.rank} is number {local_rank} of its node, which shows {num} GPUs; start as "
                    "many ranks as there are GPUs, each of which serves one, or look at CUDA_VISIBLE_DEVICES"
                )
            torch.cuda.set_device(self.device)
        else:
            workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(config.num_threads or max(1, num_cores() // workers))
        self.precision = agreed_precision(config.precision, self.device)
        self.grad_accum_steps = grad_accum_steps(global_batch_size, config.micro_batch_size, self.world_size)
        self.module = module
        self.parameters = trainable_parameters(module)
        if not self.parameters:
            raise ValueError("the module has no parameter that requires a gradient")
        if self.device.type == "cuda" and self.precision == "bf16":
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        self.math_attention = config.attention == "math" or (
            config.attention == "auto" and self.device.type == "cpu"
        )
        self.stage = stage_to_run(config, self.world_size)
        self.forward = forward = Forward(module, self.precision, self.device)
        replicated = [] if config.frozen == "sharded" else frozen
        for part in replicated:
            part.to(self.device)
        take_out(forward, replicated)
        self.deepspeed = self._initialize(forward, global_batch_size, layers if self.stage == 3 else ())
        # One rank has nobody to average with.
        self.deepspeed.enable_backward_allreduce = self.stage > 0 or self.world_size > 1
        self.partition = Partition(self.parameters, self.deepspeed.optimizer, self.stage)
        self.losses: list[dict[str, Tensor]] = []
        self.keys: list[str] = []

    def _initialize(self, forward: Forward, global_batch_size: int, whole: Sequence[nn.Module]) -> Any:
        with quiet_stdout(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            # On CPU, DeepSpeed would compile a shared-memory operator on first use: a minute,
            # and a C++ compiler needed.
            # Only its inference all-reduce calls it; training goes through gloo.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            for part in whole:
                deepspeed.utils.set_z3_leaf_module(part, True)
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
            settings = deepspeed_config(
                self.config, self.stage, global_batch_size, self.world_size, num_trainable
            )
            if whole:
                # it would put a Python function of its own in the place of every product
                settings["zero_optimization"]["memory_efficient_linear"] = False
            return deepspeed.initialize(model=forward, optimizer=optimizer, config=settings)[0]

    def weights(self) -> dict[str, Tensor] | None:
        """The trained weights on rank 0, there on the CPU; None elsewhere. Called by all ranks."""
        if self.stage == 3:
            return self.partition.gather(self.partition.masters)
        return None if self.rank else {name: p.detach().cpu() for name, p in self.parameters.items()}

    def rehearse(self, **inputs: Any) -> None:
        """A forward and a backward pass that leave nothing behind and wait for no other rank. Not under stage
        3, whose weights are with the others.
        """
        assert self.stage < 3
        with sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext():
            losses = self.forward(**inputs).values()
            total = functools.reduce(torch.add, [one.float().mean() for one in losses])
            torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)

    def accumulate(self, keys: list[str], **inputs: Any) -> Float[Tensor, " b"]:
        """Forward and backward of one micro-batch; returns the first loss of each sample. `keys` name the
        samples should one go wrong.
        """
        # around the backward pass too: activations that are computed again must be the same
        with sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext():
            losses = {name: values.float() for name, values in self.deepspeed(**inputs).items()}
            self.deepspeed.backward(functools.reduce(torch.add, [one.mean() for one in losses.values()]))
        self.losses.append({name: values.detach() for name, values in losses.items()})
        self.keys.extend(keys)
        if len(self.losses) < self.grad_accum_steps:
            self.deepspeed.step()  # counts the micro-batch; the update comes with the last one
        return next(iter(self.losses[-1].values()))

    def update(self, step: int, stop: bool = False) -> StepStats:
        """Clip and apply the gradient of the accumulated micro-batches. `stop` tells all ranks that this one
        was asked to stop; the update is made all the same.

        Raises:
            NonFiniteError: on every rank, before the weights change, with the step and the keys of the batch.
        """
        assert len(self.losses) == self.grad_accum_steps
        losses = {name: torch.cat([part[name] for part in self.losses]) for name in self.losses[0]}
        keys, self.losses, self.keys = self.keys, [], []
        # Every rank must take the same branch, or the others would wait for it in the next collective.
        means = [values.mean() for values in losses.values()]
        totals = torch.stack([*means, means[0].new_tensor(float(stop))])
        if self.world_size > 1:
            dist.all_reduce(totals)
        *summed, num_stops = totals.tolist()
        reported = {name: total / self.world_size for name, total in zip(losses, summed, strict=True)}
        if not math.isfinite(sum(reported.values())):
            is_bad = ~functools.reduce(torch.add, losses.values()).isfinite()
            self._stop("loss", step, [k for k, bad in zip(keys, is_bad, strict=True) if bad])
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = self._clip(step, keys)
            self.deepspeed.step()
        else:
            # ZeRO checks the norm first, on all ranks alike, and skips the update where it is not finite.
            self.deepspeed.step()
            if self.deepspeed.optimizer.overflow:
                self._stop("gradient", step, keys)
            norm = float(self.deepspeed.get_global_grad_norm())
        return StepStats(reported, norm, lr, num_stops > 0)

    def _clip(self, step: int, keys: list[str]) -> float:
        """Without ZeRO, DeepSpeed would take the norm again, and apply a gradient that is not finite."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(value := float(norm)):
            self._stop("gradient", step, keys)
        if self.config.grad_clip is not None and value > self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        return value

    def _stop(self, what: str, step: int, keys: list[str]) -> None:
        gathered: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, keys)
        names = [key for part in gathered for key in part]
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise NonFiniteError(
            f"step {step}: the {what} is not finite; the weights are unchanged. Samples: {shown}. Look at "
            "these samples, or lower engine.lr or engine.grad_clip, and resume from the last checkpoint"
        )


# DeepSpeed 0.19.8 calls names that torch 2.13 deprecates; nothing here can change that.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
