"""What this rank's optimizer holds of each parameter, under any ZeRO stage: gathered, saved, and loaded again
on any number of ranks.

ZeRO keeps what the optimizer updates in flat float32 tensors: groups of parameters end to end, cut into one
piece a rank (stages 1 and 2), or a piece of every parameter (stage 3). Here each piece has the name of its
parameter and its place in it, so that files written by N ranks serve M, whatever the stage.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each element."""
GATHER_ELEMENTS = 2**26
"""Elements on their way to rank 0 at once."""


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + numel` of a flattened parameter, at `offset` of master tensor `master`."""

    name: str
    start: int
    numel: int
    master: int
    offset: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The fragment's view of tensors that are laid out like the masters."""
        return tensors[self.master].detach().view(-1).narrow(0, self.offset, self.numel)


class Partition:
    """The fragments of one rank.

    Args:
        parameters: name -> trainable parameter.
        optimizer: DeepSpeed's, or torch's own where nothing is sharded.
        stage: ZeRO's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any, stage: int):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_sharded = stage > 0
        self.shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        self.adamw: torch.optim.Optimizer = optimizer.optimizer if self.is_sharded else optimizer
        match stage:
            case 0:
                self.masters: list[Tensor] = list(parameters.values())
                self.fragments = [
                    Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(parameters.items())
                ]
            case 1 | 2:
                self.masters = list(optimizer.single_partition_of_fp32_groups)
                self.fragments = list(_cut_groups(parameters))
            case _:
                self.masters = list(optimizer.fp32_partitioned_groups_flat)
                self.fragments = list(_cut_parameters(parameters, optimizer, self.rank))

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Tensors laid out like the masters -> whole ones by parameter name, on rank 0 and there on the CPU;
        None elsewhere. Called by all ranks.
        """
        if not self.is_sharded or self.world_size == 1:
            if self.rank:
                return None
            return {f.name: f.of(tensors).reshape(self.shapes[f.name]).cpu() for f in self.fragments}
        whole: dict[str, Tensor] = {}
        own = {fragment.name: fragment for fragment in self.fragments}
        for names in self._batches():
            sizes = [self.shapes[name].numel() for name in names]
            # Each element is on one rank: the sum over ranks is that element, exactly.
            buffer = torch.zeros(
                sum(sizes), device=tensors[0].device if dist.get_backend() == "gloo" else "cuda"
            )
            for name, part in zip(names, buffer.split(sizes), strict=True):
                if (fragment := own.get(name)) is not None:
                    part[fragment.start : fragment.start + fragment.numel] = fragment.of(tensors)
            dist.reduce(buffer, dst=0)
            if self.rank == 0:
                parts = buffer.cpu().split(sizes)
                whole |= {n: p.reshape(self.shapes[n]).clone() for n, p in zip(names, parts, strict=True)}
        return whole if self.rank == 0 else None

    def _batches(self) -> Iterator[list[str]]:
        batch, elements = [], 0
        for name, shape in self.shapes.items():
            if batch and elements + shape.numel() > GATHER_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(name)
            elements += shape.numel()
        if batch:
            yield batch

    @torch.no_grad()
    def read(self, path: Path, tensors: Sequence[Tensor]) -> None:
        """This rank's share of a file of whole tensors into tensors laid out like the masters."""
        with safe_open(str(path), "pt") as file:
            for fragment in self.fragments:
                whole = file.get_tensor(fragment.name).reshape(-1)
                fragment.of(tensors).copy_(whole[fragment.start : fragment.start + fragment.numel])

    def save(self, folder: Path) -> Path | None:
        """This rank's optimizer state as one file of `folder`; None where it is another's too."""
        if self.rank and not self.is_sharded:
            return None
        world_size = self.world_size if self.is_sharded else 1
        tensors, starts = {}, {}
        for moment in MOMENTS:
            # AdamW makes its state in the first update
            values = [self.adamw.state[m].get(moment, torch.zeros_like(m)) for m in self.masters]
            for fragment in self.fragments:
                starts[fragment.name] = fragment.start
                tensors[f"{fragment.name}/{moment}"] = fragment.of(values).cpu().clone()
        path = folder / f"optimizer_{self.rank:05d}_of_{world_size:05d}.safetensors"
        save_file(tensors, str(path), {"starts": json.dumps(starts)})
        return path

    @torch.no_grad()
    def load(self, folder: Path, step: int) -> None:
        """The state after `step` updates, from what any number of ranks saved.

        Raises:
            ValueError: a file or a part of a parameter is missing.
        """
        saved = SavedState(folder)
        moments = {name: [torch.zeros_like(m, requires_grad=False) for m in self.masters] for name in MOMENTS}
        for name, tensors in moments.items():
            for fragment in self.fragments:
                saved.read(f"{fragment.name}/{name}", fragment.start, fragment.of(tensors))
        for i, master in enumerate(self.masters):
            # where torch's fused AdamW keeps its count
            count = torch.tensor(float(step), dtype=torch.float32, device=master.device)
            self.adamw.state[master] = {"step": count} | {name: moments[name][i] for name in MOMENTS}


class SavedState:
    """The optimizer files of a checkpoint, read by parameter and range."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("optimizer_*_of_*.safetensors"))
        expected = int(paths[0].stem.rpartition("_")[2]) if paths else 1
        if len(paths) != expected:
            raise ValueError(
                f"{folder}: {len(paths)} of {expected} optimizer files; the checkpoint is incomplete, "
                "copy it again or resume from another"
            )
        self.folder = folder
        self.files = [safe_open(str(path), "pt") for path in paths]
        self.parts: dict[str, list[tuple[int, Any]]] = {}
        for file in self.files:
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():
                self.parts.setdefault(key, []).append((starts[key.rpartition("/")[0]], file))

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fills `target` with elements `start` onwards of a flattened tensor."""
        end, missing = start + target.numel(), target.numel()
        for first, file in self.parts.get(key, ()):
            values = file.get_slice(key)
            low, high = max(start, first), min(end, first + values.get_shape()[0])
            if low < high:
                target[low - start : high - start] = values[low - first : high - first].to(target.device)
                missing -= high - low
        if missing:
            raise ValueError(
                f"{self.folder}: {missing} elements of {key} in {start} to {end} are in no optimizer file; "
                "the checkpoint is of another model, or incomplete"
            )


def _cut_groups(parameters: Mapping[str, nn.Parameter]) -> Iterator[Fragment]:
    """Stages 1 and 2: DeepSpeed notes on each parameter where this rank's part of it lies."""
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is not None:
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, there.start, here.numel, mapping.param_group_index, here.start)


def _cut_parameters(parameters: Mapping[str, nn.Parameter], optimizer: Any, rank: int) -> Iterator[Fragment]:
    """Stage 3: every parameter in equal parts, the last ones padded."""
    for name, parameter in parameters.items():
        master, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * part
        numel = min(part, parameter.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]
        if numel > 0:
            yield Fragment(name, start, numel, master, offset)
