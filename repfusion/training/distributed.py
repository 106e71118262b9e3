"""The group of ranks: made from what torchrun or Ray Train say, or of one process; what they agree on."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from repfusion.locks import locked

T = TypeVar("T")
PATIENCE_SEC = 60.0
"""How long a training waits for one that is at work in its folder: its own may just have been killed."""
PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others."""


def prepare_environment() -> None:
    """Environment that DeepSpeed and gloo read when first used; what the user set is kept."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Prompts vary in length: segments that can grow keep memory from falling into pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # DeepSpeed insists on a local rank, launcher or not.
    os.environ.setdefault("LOCAL_RANK", "0")
    if is_one_machine():
        # Keep the ranks' connections off the network.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def init_process_group(backend: str | None = None) -> None:
    """Join the group that torchrun or Ray Train describes, or make one of a single process, which needs
    no port. `backend` None is nccl where there is a GPU, else gloo.
    """
    if dist.is_initialized():
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif (listener := _listener()) is None:
        dist.init_process_group(backend)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(
            *listener,
            world_size,
            is_master=rank == 0,
            timeout=PATIENCE,
            wait_for_workers=False,
            master_listen_fd=_listen(*listener) if rank == 0 else None,
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


def _listener() -> tuple[str, int] | None:
    """Host and port of the store that the ranks find each other by, where rank 0 is to listen there and
    nowhere else: whoever reaches a store may write into it without a word, and torch's listens on every
    interface.

    None where torchrun's agent has a store already, and where MASTER_ADDR is a name, on several machines:
    there it may be another address to its own machine than to the others.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not port:
        return None
    host = "127.0.0.1" if is_one_machine() else host
    return None if _is_name(host) else (host, int(port))


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _listen(host: str, port: int) -> int:
    """A listening socket's descriptor, which the store takes over."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024).detach()


def is_one_machine() -> bool:
    """Whether all ranks run on this machine."""
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def failures(error: BaseException | None) -> dict[int, str]:
    """Which ranks failed and how, known to every rank, so that all take the same way. Called by all ranks."""
    texts = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    return {rank: text for rank, text in enumerate(texts) if text is not None}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a second training out of an output folder. Called by all ranks; rank 0 has the lock.

    Raises:
        ValueError: on every rank, where another training is at work there. Ranks that were killed a moment
            ago are waited for.
    """
    with ExitStack() as held:
        error = None
        try:
            if dist.get_rank() == 0:
                held.enter_context(locked(folder / ".lock", "give another output_dir", wait_sec=PATIENCE_SEC))
        except (ValueError, OSError) as caught:
            error = caught
        if found := failures(error):
            raise ValueError("; ".join(found.values()))
        yield


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shut_down() -> None:
    """Leave the process group, for a process that started it itself."""
    if dist.is_initialized():
        dist.destroy_process_group()
