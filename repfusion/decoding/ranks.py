"""The ranks that train one decoder: what each takes of a batch, and the means that all of them make."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from repfusion.generation.device import usable_device
from repfusion.training.distributed import init_process_group, num_cores, prepare_environment


@dataclass(frozen=True)
class Ranks:
    """A rank and how many there are; one alone has no group."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """The rank that torchrun started this process as, in its group; else the only one."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        prepare_environment()
        init_process_group()
        if not torch.cuda.is_available():
            workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, num_cores() // workers))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This rank's device: of several GPUs that of its number on its node. Raises ValueError where there
        is none.
        """
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        device = usable_device(local if name == "cuda" and self.world_size > 1 else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def parts(self, batch_size: int, micro_batch_size: int | None) -> list[range]:
        """The numbers in a batch that this rank takes, pass by pass.

        Raises:
            ValueError: the batch is no multiple of what all ranks take in a pass.
        """
        size = micro_batch_size or max(1, batch_size // self.world_size)
        if batch_size % (size * self.world_size):
            raise ValueError(
                f"length.batch_size {batch_size} is not a multiple of {size} images a pass x "
                f"{self.world_size} ranks; change it or micro_batch_size"
            )
        share = batch_size // self.world_size
        first = self.rank * share
        return [range(start, start + size) for start in range(first, first + share, size)]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the ranks, with the same bits on each. Called by all ranks."""
        if self.world_size == 1:
            return list(tensors)
        flat = torch.cat([one.detach().float().flatten() for one in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.world_size).split([one.numel() for one in tensors])
        return [part.view_as(one) for part, one in zip(parts, tensors, strict=True)]
