"""A short training under torchrun that says the most bytes of tensors alive at a moment of it:
`held_bytes.py JSON`, the JSON of an EngineConfig's fields.
"""

import gc
import json
import sys

import torch
from torch import Tensor, nn

from repfusion.training.distributed import shut_down
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine, EngineConfig


class Tower(nn.Module):
    """A frozen layer, then many trained ones of one size, so that shares come out even."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(300, 64, bias=False).requires_grad_(False)
        self.trained = nn.Sequential(*(nn.Linear(64, 64) for _ in range(21)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"square": self.trained(self.frozen(x)).square().mean(dim=1)}


def alive() -> int:
    """Bytes of all storages, each counted once."""
    tensors = [one for one in gc.get_objects() if isinstance(one, Tensor)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def main() -> None:
    torch.manual_seed(0)
    fields = {"precision": "fp32", "micro_batch_size": 1, "num_threads": 1, **json.loads(sys.argv[1])}
    config = EngineConfig.model_validate(fields)
    module = Tower()
    engine = Engine(module, config, 4, 3, [module.frozen])
    ema = EMA(engine.partition.masters, 0.9)
    most = 0
    module.trained[0].register_full_backward_hook(lambda *_: see())

    def see() -> None:
        nonlocal most
        gc.collect()
        most = max(most, alive())

    for step in range(2):
        for _ in range(engine.grad_accum_steps):
            engine.accumulate(["key"], x=torch.randn(1, 300))
            see()
        engine.update(step)
        ema.update(step)
        see()
    print(f"held {most}", flush=True)
    shut_down()


if __name__ == "__main__":
    main()
