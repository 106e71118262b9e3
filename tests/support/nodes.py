"""Raylets on one machine as the nodes of a cluster."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from killing import TAG, wait_until_gone

ROOT = Path(__file__).parents[2]


@dataclass
class Nodes:
    """A head without CPUs, and nodes by the number of their CPUs."""

    cluster: Any
    ray_folder: str
    nodes: list[Any] = field(default_factory=list)

    def add(self, num_cpus: int) -> str:
        """Returns the node's id."""
        node = self.cluster.add_node(
            node_ip_address="127.0.0.1",
            num_cpus=num_cpus,
            object_store_memory=80 << 20,
            temp_dir=self.ray_folder,
            include_dashboard=False,
        )
        self.nodes.append(node)
        return node.node_id

    def kill(self, node_id: str) -> None:
        """By SIGKILL of all its processes, as when a machine goes."""
        (node,) = [node for node in self.nodes if node.node_id == node_id]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def wait_until_known_dead(self, node_id: str) -> None:
        """Ray notices by missing heartbeats, after some 15 seconds."""
        start = time.monotonic()
        while any(
            node["Alive"] and node["NodeID"] == node_id for node in self.cluster.global_state.node_table()
        ):
            assert time.monotonic() - start < 120
            time.sleep(0.5)


@contextmanager
def cluster_of_nodes(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[Nodes]:
    """With a head alone; everything is gone after the block."""
    from ray.cluster_utils import Cluster

    tag, folder = f"{os.getpid()}-cluster-{name}", tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    for variable, value in {
        TAG: tag,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        monkeypatch.setenv(variable, value)
    cluster = Cluster()
    nodes = Nodes(cluster, folder)
    try:
        nodes.add(num_cpus=0)
        yield nodes
    finally:
        cluster.shutdown()
        wait_until_gone(tag)
        shutil.rmtree(folder, ignore_errors=True)
