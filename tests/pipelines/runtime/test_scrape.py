"""A real workflow's metrics as Ray's exporter gives them, and as a Prometheus answers where there is one."""

import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from observed import FOLDER, Series, queries, scrape, value_of
from running import run_all

from cluster.kinds.processes import ports_of, wait_until
from pipelines.runtime.metrics import (
    ACTOR_SECONDS,
    DROPS,
    EVALUATIONS,
    FAILURES_IN_A_ROW,
    METRICS,
    MFU,
    SAMPLES,
    STEPS_LEFT,
    UNFINISHED,
    to_ray,
)
from pipelines.runtime.pool import ActorPool


@contextmanager
def watched(port: int) -> Iterator[dict[str, Series]]:
    """All that an exporter had in the time of the block: a gauge goes 20 s after the process that set it."""
    seen: dict[str, Series] = defaultdict(dict)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            for name, series in scrape(port).items():
                seen[name] |= series

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


@pytest.mark.ray
@pytest.mark.slow
def test_a_workflow_s_metrics_come_out_of_ray_s_exporter(
    configure: Callable[..., Any], models: dict[str, Path], pool: ActorPool, tmp_path: Path
):
    """All of them, of a real workflow with a training and an evaluation; on a CPU the MFU is told by hand."""
    import ray

    training = {
        "model": {
            "encoder": {"path": models["tower"]},
            "mllm": models["llava"],
            "decoder": models["decoder"],
            "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2},
            "conditioning": "noisy_latents",
        },
        "engine": {"precision": "fp32", "micro_batch_size": 8, "num_threads": 1, "warmup_steps": 1},
        **{"global_batch_size": 8, "num_steps": 600, "checkpoint_every_steps": 300, "log_every_steps": 20},
        "num_workers": 1,
    }
    scoring = {
        "suites": {"scenes": {"num_prompts": 6}},
        "batch_size": 6,
        "sampler": {"num_steps": 1},
    }
    config = configure(
        tmp_path / "seen", last_stage="evaluate", trainings={"train": training}, evaluate=scoring
    )
    (node,) = ray.nodes()
    with watched(node["MetricsExportPort"]) as seen, asked_of_prometheus(node["MetricsExportPort"], tmp_path):
        results, _ = run_all(config, pool)
        to_ray()(MFU, 0.4, {"workflow": "by_hand", "training": "train"})
        assert wait_until(lambda: bool(seen[MFU.exported]), 40)
    silent = {
        metric.name
        for metric in METRICS
        if not any(("workflow", "seen") in labels for labels in seen[metric.exported])
    }
    assert silent == {MFU.name}
    for name in ("ingest", "curate", "image_features"):
        of, made = {"workflow": "seen", "stage": name}, results[name].manifest
        assert value_of(seen[SAMPLES.exported], **of) == made.samples
        for reason, number in made.drops.items():
            assert value_of(seen[DROPS.exported], **of, reason=reason) == number
        assert value_of(seen[UNFINISHED.exported], **of) == 0
        assert value_of(seen[ACTOR_SECONDS.exported], **of, state="busy") > 0
    of = {"workflow": "seen", "training": "train"}
    assert value_of(seen[STEPS_LEFT.exported], **of) == 0
    assert value_of(seen[EVALUATIONS.exported], **of, status="finished") >= 1
    assert value_of(seen[FAILURES_IN_A_ROW.exported], **of) == 0


@contextmanager
def asked_of_prometheus(port: int, folder: Path) -> Iterator[None]:
    """Where a Prometheus is installed it scrapes for the length of the block, then answers every query of the
    dashboard for that time, and takes the rules of the alerts.
    """
    if (program := shutil.which("prometheus")) is None:
        yield
        return
    (own,) = ports_of({"prometheus": None})
    scraping = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    settings = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(FOLDER / "alerts.yaml")],
        "scrape_configs": [scraping],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    options = {
        "config.file": folder / "prometheus.yaml",
        "storage.tsdb.path": folder / "prometheus",
        "web.listen-address": f"127.0.0.1:{own}",
    }
    begun = time.time()
    process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())])
    try:
        yield
        for query in queries():
            text = query.replace("$workflow", ".*").replace("$__rate_interval", "1m")
            # an alert that has nothing to say gives no series: what it compares does
            text = text.partition(" > 0")[0].partition(" == 0 and")[0]
            asked = {"query": text, "start": begun, "end": time.time(), "step": "2s"}
            address = f"http://127.0.0.1:{own}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert yaml.safe_load(answer.read())["data"]["result"], query
        with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/rules", timeout=10) as answer:
            (group,) = yaml.safe_load(answer.read())["data"]["groups"]
        assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(group["rules"])
    finally:
        process.terminate()
        process.wait(20)
