"""What is written of a cluster that is up, under runs/clusters/NAME: enough to find it and to end it."""

import secrets
import time
from pathlib import Path

from pydantic import ValidationError

from cluster.config import ClusterError
from repfusion.config import Strict
from repfusion.files import write_json, write_text

FOLDER = Path("runs/clusters")
"""Relative to the working directory, as a workflow's root is."""


class NodeRecord(Strict):
    """One `ray start` that runs until it is ended."""

    name: str
    """The group and a number, or `head`."""
    group: str
    pid: int
    """On its host."""
    host: str = "127.0.0.1"
    log: str
    """File of what it says, on its host."""


class ClusterRecord(Strict):
    """A cluster that was started from here."""

    name: str
    mark: str
    """Value of the environment variable by which its processes are known: nobody else's have it."""
    address: str
    """host:port of the head."""
    jobs_address: str
    """Where the Jobs API answers."""
    ray_folder: str
    """Ray's temporary folder, on each host."""
    started: float
    """Seconds since 1970."""
    nodes: list[NodeRecord] = []

    def with_node(self, node: NodeRecord) -> "ClusterRecord":
        """A record with the node, in the place of an earlier one of its name."""
        others = [one for one in self.nodes if one.name != node.name]
        return self.model_copy(update={"nodes": [*others, node]})


def new_mark(name: str) -> str:
    """A mark that no other cluster has."""
    return f"{name}-{secrets.token_hex(8)}"


def folder_of(name: str) -> Path:
    """Where all that is known of a cluster lies."""
    return FOLDER / name


def read_record(name: str) -> ClusterRecord | None:
    """None where the cluster was not started from this folder, or was ended.

    Raises:
        ClusterError: the record cannot be read.
    """
    path = folder_of(name) / "cluster.json"
    try:
        return ClusterRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ClusterError(f"{path} is no record of a cluster: {error.errors()[0]['msg']}") from error


def write_record(record: ClusterRecord) -> None:
    """Written before anything waits, so that `down` finds what was started."""
    write_json(folder_of(record.name) / "cluster.json", record.model_dump(mode="json"))


def forget(name: str) -> None:
    """Removes the record and the token; the logs stay."""
    for file in ("cluster.json", "token"):
        (folder_of(name) / file).unlink(missing_ok=True)


def token_file(name: str) -> Path:
    """A cluster's token, made where there is none; nobody but its owner reads it."""
    path = folder_of(name) / "token"
    if not path.is_file():
        write_text(path, secrets.token_hex(32), mode=0o600)
    return path.resolve()


def since(started: float) -> str:
    """How long ago, in words."""
    minutes = int(time.time() - started) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
