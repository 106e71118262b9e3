"""Raylets on one machine as the nodes of a cluster: a node that dies in the middle of a stage, nodes that are
too small, a cluster that shrinks to nothing.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from killing import contents, differences, tagged_process, temporaries
from running import until

from pipelines.config import WorkflowConfig
from repfusion.config import to_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
LIMIT_SEC = 400


@dataclass
class Calls:
    """What the workers wrote."""

    path: Path

    def lines(self) -> list[tuple[str, str, str, str]]:
        if not self.path.exists():
            return []
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [(what, stage, name, node) for what, stage, name, node in lines]

    def starts(self) -> Counter[tuple[str, str]]:
        """How often each (stage, shard) was begun."""
        return Counter((stage, name) for what, stage, name, _ in self.lines() if what == "start")

    def in_flight(self, node_id: str) -> set[tuple[str, str]]:
        """Begun on a node and not ended."""
        flying = Counter()
        for what, stage, name, node in self.lines():
            if node == node_id:
                flying[stage, name] += 1 if what == "start" else -1
        return {one for one, number in flying.items() if number > 0}

    def nodes(self) -> set[str]:
        return {node for *_, node in self.lines()}


def start(config: WorkflowConfig, folder: Path, **environment: str):
    """A workflow's process (a context manager) and the calls of its workers."""
    path = folder / f"{config.root.name}.yaml"
    path.write_text(to_yaml(config))
    calls = Calls(folder / f"{config.root.name}.calls")
    command = [sys.executable, str(ROOT / "tests" / "support" / "counted_run.py"), str(path), str(calls.path)]
    tag = f"{os.getpid()}-{folder.name}-{config.root.name}"
    variables = {"PYTHONPATH": str(ROOT), **environment}
    return tagged_process(command, tag, folder / f"{config.root.name}.log", variables), calls


def run_alone(config: WorkflowConfig, folder: Path) -> dict[str, Any]:
    """Contents of a run on a local Ray that nobody disturbs."""
    context, calls = start(config, folder)
    with context as process:
        assert process.wait(LIMIT_SEC) == 0, (folder / f"{config.root.name}.log").read_text()
    assert set(calls.starts().values()) == {1}
    return contents(config.root)


def test_a_node_that_dies_costs_only_the_shards_in_flight(nodes, make_config, tmp_path):
    expected = run_alone(make_config("reference"), tmp_path)
    stays, goes = nodes.add(num_cpus=1), nodes.add(num_cpus=1)
    # two actors, one a node: each stage is wide enough to be at work on both
    config = make_config("cluster", ray={"address": nodes.cluster.address})
    context, calls = start(config, tmp_path, SHARD_SEC="2")
    log = tmp_path / "cluster.log"
    with context as process:
        until(lambda: any(stage == "image_features" for stage, _ in calls.in_flight(goes)), process, log)
        lost = calls.in_flight(goes)
        nodes.kill(goes)
        assert process.wait(LIMIT_SEC) == 0, log.read_text()
    assert calls.nodes() == {stays, goes}
    again = {one for one, number in calls.starts().items() if number > 1}
    # a call may have ended between the look and the kill
    assert again <= lost | calls.in_flight(goes)
    assert max(calls.starts().values()) <= 2
    assert differences(expected, contents(config.root)) == []
    assert not temporaries(config.root)


def test_only_the_node_that_is_large_enough_works_and_without_it_the_stage_ends(nodes, make_config, tmp_path):
    large = nodes.add(num_cpus=2)
    nodes.add(num_cpus=1)
    stages = ("source", "ingest", "curate")
    config = make_config(
        "cluster",
        last_stage="curate",
        ray={"address": nodes.cluster.address},
        **{stage: {"actors": {"num_cpus": 2}} for stage in stages},
    )
    context, calls = start(config, tmp_path, SHARD_SEC="2", NO_ACTOR_SEC="20")
    log = tmp_path / "cluster.log"
    with context as process:
        until(lambda: any(stage == "ingest" for stage, _ in calls.in_flight(large)), process, log)
        nodes.kill(large)
        assert process.wait(LIMIT_SEC) == 1, log.read_text()
    assert "error: stage ingest: no actor started within 20 s" in log.read_text()
    assert calls.nodes() == {large}

    nodes.wait_until_known_dead(large)
    # what is left is too small, which is said before anything waits
    context, calls = start(config, tmp_path)
    with context as process:
        assert process.wait(LIMIT_SEC) == 1
    assert "stage ingest: no node has the 2 CPUs and 0 GPUs of one actor" in log.read_text()

    # another large one takes up where the first was
    nodes.add(num_cpus=2)
    context, calls = start(config, tmp_path)
    with context as process:
        assert process.wait(LIMIT_SEC) == 0, log.read_text()
    assert {calls.starts()["source", f"{index:05d}"] for index in range(4)} == {1}
    assert not temporaries(config.root)
