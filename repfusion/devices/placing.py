"""What a device can do, what it computes in, and what its errors mean."""

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "float16"]
"""What weights are held and products are computed in."""
Autocast = Literal["fp32", "bf16"]
"""What products of float32 weights are computed in; bf16 is autocast."""


def precision_of(asked: Literal["auto"] | Precision, on_gpu: bool) -> Precision:
    """What frozen weights compute in: `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if asked == "auto":
        return "bfloat16" if on_gpu else "float32"
    return asked


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16, or fast ways around them. Where it has
    none, torch multiplies number by number: fifty times slower than in float32 on a CPU with AVX2 alone.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True


def autocast_of(asked: Literal["auto"] | Autocast, device: torch.device) -> Autocast:
    """What products are computed in on a device: `auto` is bf16 where it multiplies in it, fp32 elsewhere."""
    if asked == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return asked


def find_device(on_gpu: bool, precision: Precision, key: str) -> torch.device:
    """The device that a worker was given, once it is known to compute in a precision.

    Args:
        on_gpu: whether it was given a GPU.
        precision: what it computes in.
        key: where the configuration says so.

    Raises:
        ValueError: torch sees no GPU, or one without bfloat16.
    """
    if not on_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        raise ValueError(
            f"torch {torch.__version__} sees no GPU, though this worker was given one: "
            + (
                f"it was built for CUDA {built}; compare with the driver's (nvidia-smi), and look at "
                "CUDA_VISIBLE_DEVICES"
                if built
                else "it was built without CUDA; install torch's wheel for the driver's CUDA"
            )
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if precision == "bfloat16" and not multiplies_bf16(device):
        raise ValueError(
            f"{torch.cuda.get_device_name()} has no bfloat16: set {key} to float32, or to float16 for a "
            "tower that stays within its range"
        )
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # cuBLAS and the CPU's allocator have errors of their own
    said = str(error)
    return isinstance(error, RuntimeError) and ("ALLOC_FAILED" in said or "can't allocate memory" in said)


def free_cached(device: torch.device) -> None:
    """Gives back what torch keeps of a GPU's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class BatchRoom:
    """Work on batches of at most `most` items. One that does not fit into the device's memory is worked on in
    halves, and so are all after it, with a warning.

    Args:
        most: items of a full batch.
        device: that has to hold it.
        key: the configuration's field of the batch size.
    """

    def __init__(self, most: int, device: torch.device, key: str):
        self.most, self.device, self.key = most, device, key

    def __call__(self, work: Callable[[Any], T], batch: Any) -> list[T]:
        """Results of the parts of a batch, which is a tensor or a sequence, in order.

        Raises:
            MemoryError: not even one item fits.
        """
        if len(batch) > self.most:
            parts = [batch[at : at + self.most] for at in range(0, len(batch), self.most)]
            return [one for part in parts for one in self(work, part)]
        try:
            return [work(batch)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(f"{self.key}: not even one item fits into {self.device}") from error
        # out here, where the failed call holds nothing any more
        free_cached(self.device)
        tried, self.most = len(batch), (len(batch) + 1) // 2
        said = "%d at once do not fit into the memory of %s: %d are taken from now on; set %s=%d"
        log.warning(said, tried, self.device, self.most, self.key, self.most)
        return self(work, batch)
