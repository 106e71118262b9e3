"""A micro-batch that does not fit: the error names one that does, tried on the very samples."""

import pytest
import torch
from torch import Tensor, nn

from repfusion.data.batches import Batch
from repfusion.training.engine import Engine, EngineConfig
from repfusion.training.room import NoRoomError, accumulate


class Crowded(nn.Module):
    """Has no room for more than so many samples."""

    def __init__(self, room: int):
        super().__init__()
        self.weight, self.room = nn.Parameter(torch.ones(2)), room

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(inputs["x"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")
        return {"loss": (inputs["x"] * self.weight).sum(1)}


def engine_of(module: nn.Module, micro_batch_size: int, **changes) -> Engine:
    settings = {"precision": "fp32", "num_threads": 1, "micro_batch_size": micro_batch_size, **changes}
    return Engine(module, EngineConfig(**settings), global_batch_size=24, num_steps=1)


def batch_of(size: int) -> Batch:
    names = [str(one) for one in range(size)]
    return Batch(list(range(size)), names, names, [0] * size, {"x": torch.ones(size, 2)})


@pytest.mark.parametrize(("room", "fitting"), [(11, 8), (8, 8), (7, 6), (3, 3), (1, 1)])
def test_the_largest_that_fits_is_named(room, fitting):
    engine, tried = engine_of(Crowded(room), 12), []

    def smaller(size: int) -> dict[str, Tensor]:
        tried.append(size)
        return batch_of(size).inputs

    with pytest.raises(NoRoomError, match=rf"micro_batch_size 12 does not fit.*; {fitting} fits: ") as raised:
        accumulate(engine, batch_of(12), smaller)
    assert "Tried to allocate 20.00 GiB" in str(raised.value) and "more lines" not in str(raised.value)
    assert tried[-1] == fitting and all(24 % size == 0 for size in tried)
    assert engine.module.weight.grad is None, "trying leaves nothing behind"


def test_where_none_fits_it_says_so_and_under_stage_3_it_advises_only():
    with pytest.raises(NoRoomError, match="and no smaller one does"):
        accumulate(engine_of(Crowded(0), 12), batch_of(12), lambda size: batch_of(size).inputs)
    with pytest.raises(NoRoomError, match="does not fit into the memory of cpu; try 8"):
        accumulate(engine_of(Crowded(4), 12, zero_stage=3), batch_of(12), lambda size: batch_of(size).inputs)


def test_what_fits_is_as_it_was_and_other_errors_pass():
    engine = engine_of(Crowded(12), 12)
    assert accumulate(engine, batch_of(12), lambda size: {}).tolist() == [2.0] * 12
    with pytest.raises(RuntimeError, match="must match"):
        accumulate(engine, Batch([0], ["a"], ["a"], [0], {"x": torch.ones(1, 3)}), lambda size: {})
