"""Which Ray a session joins, and what is said of one that cannot be joined."""

import os
import signal
import socket
import sys
from collections.abc import Iterator

import pytest
from ray.exceptions import AuthenticationError

from pipelines.runtime.session import RayConfig, StageError, _answering, ray_session


@pytest.fixture
def head() -> Iterator[str]:
    """host:port of what listens on loopback alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def no_head() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_on_loopback_is_reached_there(head: str):
    assert _answering(head) == head
    assert _answering(head.replace("127.0.0.1", "localhost")) == head.replace("127.0.0.1", "localhost")


def test_the_machine_s_own_address_is_taken_where_loopback_does_not_answer(
    head: str, monkeypatch: pytest.MonkeyPatch
):
    from ray._private import services

    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: "127.0.0.1")
    port = head.rpartition(":")[2]
    # nothing of ours listens on ::1
    assert _answering(f"[::1]:{port}") == head


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_other_forms_of_addresses_are_ray_s(address: str):
    assert _answering(address) == address


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that no other test has brought into a session."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.parametrize("configured", [None, "auto", "no head"])
def test_no_head_is_said_at_once(
    outside, no_head: str, monkeypatch: pytest.MonkeyPatch, configured: str | None
):
    """The environment names the cluster where the configuration leaves it open."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1" if configured == "no head" else no_head)
    address = no_head if configured == "no head" else configured
    with (
        pytest.raises(StageError, match=f"no Ray cluster answers at {no_head}.*ray start --head"),
        ray_session(RayConfig(address=address)),
    ):
        pass


@pytest.mark.parametrize("kind", [ConnectionError, AuthenticationError])
def test_a_head_that_lets_nobody_in_is_said(
    outside, head: str, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
):
    import ray

    def refuse(**settings: object) -> None:
        raise kind(f"Failed to connect to Ray cluster at {settings['address']}")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(StageError, match=f"cannot join the Ray cluster at {head}.*RAY_AUTH_MODE=token"),
        ray_session(RayConfig(address=head)),
    ):
        pass


def test_a_signal_while_ray_starts_is_ours(outside, monkeypatch: pytest.MonkeyPatch):
    """Ray puts a handler of its own in place, which ends the process with status 15."""
    import ray
    from ray._private import utils

    def init(**settings: object) -> None:
        utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    before, ray_s = signal.signal(signal.SIGTERM, terminate), utils.set_sigterm_handler
    try:
        with pytest.raises(KeyboardInterrupt), ray_session(RayConfig()):
            pass
        assert signal.getsignal(signal.SIGTERM) is terminate and utils.set_sigterm_handler is ray_s
    finally:
        signal.signal(signal.SIGTERM, before)
