"""Out of memory in a training -> what fits, by trying: the error names the micro-batch."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from repfusion.data.batches import Batch
from repfusion.devices.placing import free_cached, is_out_of_memory
from repfusion.inputs import Inputs, to_device
from repfusion.training.engine import Engine


class NoRoomError(RuntimeError):
    """A pass or an update does not fit into memory. No weight was changed."""


def accumulate(engine: Engine, batch: Batch, smaller: Callable[[int], Inputs]) -> Float[Tensor, " b"]:
    """`engine.accumulate` of a batch on the engine's device.

    Args:
        engine: of this rank.
        batch: a micro-batch.
        smaller: inputs of a micro-batch of so many samples, to try.

    Raises:
        NoRoomError: with the largest micro-batch that has room.
    """
    try:
        return engine.accumulate(batch.keys, inputs=to_device(batch.inputs, engine.device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]
    # out here, where the failed pass holds nothing any more
    raise NoRoomError(f"{advice(engine, smaller)} ({said})")


def advice(engine: Engine, smaller: Callable[[int], Inputs]) -> str:
    """What to change, tried where that asks nothing of other ranks."""
    size = engine.config.micro_batch_size
    begin = f"engine.micro_batch_size {size} does not fit into the memory of {engine.device}"
    per_rank = size * engine.grad_accum_steps
    sizes = [one for one in range(size - 1, 0, -1) if per_rank % one == 0]
    less = "engine.activation_checkpointing=selective, then full, needs less"
    if engine.stage == 3:
        tried = f"try {sizes[0]}" if sizes else "it is the least"
        return f"{begin}; {tried} (accumulation keeps the global batch); {less}"
    fitting = next((one for one in sizes if fits(engine, smaller(one))), None)
    if fitting is None:
        return f"{begin}, and no smaller one does; {less}; a higher engine.zero_stage holds less state a rank"
    return f"{begin}; {fitting} fits: accumulation keeps the global batch; {less}"


def fits(engine: Engine, inputs: Inputs) -> bool:
    """Whether a forward and a backward pass of this rank alone have room."""
    free_cached(engine.device)
    try:
        engine.rehearse(inputs=to_device(inputs, engine.device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
