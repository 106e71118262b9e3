"""A port of this machine's loopback that leads to a cluster's Jobs API, for as long as a block lasts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.config import ClusterError
from cluster.kinds import processes
from cluster.record import folder_of, new_mark

PATIENCE_SEC = 60.0


@contextmanager
def forwarded(cluster: str, command: Callable[[int], list[str]]) -> Iterator[str]:
    """The http address; `command` makes the words of the process that forwards a port.

    Raises:
        ClusterError: the process ends, or nothing listens on the port in time.
    """
    (port,), mark = processes.ports_of({"port": None}), new_mark(cluster)
    log = folder_of(cluster) / "forwarding.log"
    log.unlink(missing_ok=True)
    pid = processes.start(command(port), {**os.environ, processes.MARK: mark}, log)
    try:
        processes.wait_until(
            lambda: processes.answers(port) or not processes.is_alive(pid, mark), PATIENCE_SEC
        )
        if not processes.answers(port):
            raise ClusterError(f"the head of {cluster} is not reached:\n{processes.tail(log)}")
        yield f"http://127.0.0.1:{port}"
    finally:
        processes.end_rest(mark)
