"""A session of Ray: connected to a cluster or started on this machine, and gone when the work is."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from repfusion.config import Config
from repfusion.display.redaction import redact_text

PATIENCE_SEC = 5.0
"""Between two looks at the cluster while nothing comes of it."""
CONNECT_SEC = 5.0
"""Seconds to wait for a cluster's head to take a connection."""


class RayConfig(Config):
    """How to reach or start Ray. Changes no bytes."""

    address: str | None = None
    """A running cluster's address, "auto" or host:port; None takes RAY_ADDRESS from the environment or starts
    a local one for this run.
    """
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; None counts the machine's. More than it has lets evaluation run
    beside training.
    """
    object_store_mib: int = Field(default=128, ge=80)
    """Shared memory of a local cluster. Samples do not pass through it, so it stays small."""
    log_to_driver: bool = False
    """Whether the workers' output appears on the terminal."""


class StageError(RuntimeError):
    """A stage that could not complete; its finished shards stay."""


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connects to a cluster, or starts a local one on loopback and stops it in the end. Within a session,
    does nothing.

    Raises:
        StageError: nothing answers at the cluster's address, or what does lets nobody in.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        yield
        return
    address = config.address
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    settings: dict[str, Any] = {
        "namespace": "repfusion",
        "log_to_driver": config.log_to_driver,
        "logging_level": "ERROR",
    }
    inherited: dict[str, str] = {}
    if address:
        settings["address"] = _answering(address)
    else:
        settings |= {
            "address": "local",
            "num_cpus": config.num_cpus,
            "object_store_memory": config.object_store_mib << 20,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        # Through the environment and not a runtime_env: workers that Ray has started ahead would
        # not fit the latter.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        inherited = {
            "PYTHONPATH": path,
            "NO_ALBUMENTATIONS_UPDATE": "1",
        }
    with _environment(inherited), _signal_kept(), _loopback_kept():
        try:
            ray.init(**settings)
        except (ConnectionError, AuthenticationError) as error:
            raise StageError(
                f"cannot join the Ray cluster at {address}: {brief(error)}. Does it ask for a token, or for "
                "another one? `ray start` does where a token lies in ~/.ray, as any local run leaves one: "
                "set RAY_AUTH_MODE=token here too, and RAY_AUTH_TOKEN_PATH to the file of its token"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _answering(address: str) -> str:
    """A head's host:port as it can be reached; "auto" and the like as they are. Where a head does not listen
    on loopback, the machine's own address takes its place.
    """
    from ray._private import services

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return address
    problem = None
    for candidate in dict.fromkeys([host, services.resolve_ip_for_localhost(host)]):
        try:
            socket.create_connection((candidate.strip("[]"), int(port)), CONNECT_SEC).close()
            return f"{candidate}:{port}"
        except OSError as error:
            problem = error
    raise StageError(
        f"no Ray cluster answers at {address}: {problem}. Take the address that `ray start --head` prints, "
        "or unset RAY_ADDRESS and `ray.address` to run on this machine alone"
    )


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, as a Ray task, so that the driver's memory stays small; right
    here where there is no session.

    Raises:
        StageError: where Ray dies meanwhile.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not ray.is_initialized():
        return function(*arguments)
    ref = ray.remote(num_cpus=0)(function).remote(*arguments)
    while not ray.wait([ref], timeout=PATIENCE_SEC)[0]:
        check_ray_lives()
    try:
        return ray.get(ref)
    except RayTaskError:
        raise
    except RayError as error:
        raise StageError(f"{function.__name__} could not run: {brief(error)}") from error


def check_ray_lives() -> None:
    """Raises StageError where no node is left, not even the driver's: Ray itself would wait for ever."""
    import ray

    if not any(node["Alive"] for node in ray.nodes()):
        raise StageError(
            "Ray has no node left: its raylet was killed, perhaps for want of memory (its session folder has "
            "the logs); the finished shards are kept, run it again"
        )


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _loopback_kept() -> Iterator[None]:
    """Ray puts the machine's address in the place of 127.0.0.1; then a head of ours listens on every
    interface, and one that listens on loopback alone is not found.
    """
    from ray._private import services

    before = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = before


@contextmanager
def _signal_kept() -> Iterator[None]:
    """Ray puts its own handlers of SIGTERM in the place of ours. The one in Python, which ends the process
    with status 15, may not be set even for the moment in which Ray starts; the one of its core, which aborts,
    is replaced when Ray has started.
    """
    from ray._private import utils

    before, ours = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


def brief(error: BaseException) -> str:
    """Class and first line of an error, of its cause where a task of Ray raised it; without secrets."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return redact_text(f"{type(cause).__name__}: {lines[0]}")
