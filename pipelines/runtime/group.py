"""How the ranks of a training that Ray Train starts find each other: what torchrun would say is in each one's
environment, and the group is made by `repfusion.training.distributed`, whose store listens where it has to
alone.
"""

import os
from dataclasses import dataclass
from typing import Any

from ray.train._internal.utils import get_address_and_port
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend


@dataclass
class RankConfig(TorchConfig):
    """Ray Train's configuration of ranks, but for the store, which would listen on every interface."""

    @property
    def backend_cls(self) -> type["RankBackend"]:
        return RankBackend


class RankBackend(_TorchBackend):
    """Tells every rank where the first one is, and leaves the rest to the ranks."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_master, address, port)
        worker_group.execute(_set_torch_distributed_env_vars)


def _set_master(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
