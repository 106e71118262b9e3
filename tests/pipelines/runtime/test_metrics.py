"""What Prometheus is told: by the real pool and a real training, up to the text that Ray's exporter gives."""

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
from pipelines.runtime import pool as pool_module
from pipelines.runtime.metrics import (
    ACTOR_SECONDS,
    BYTES,
    CHECKPOINT_SECONDS,
    DROPS,
    EVALUATIONS,
    FAILED,
    FAILURES_IN_A_ROW,
    LOSS,
    METRICS,
    MFU,
    SAMPLES,
    STEP,
    STEPS_LEFT,
    UNFINISHED,
    WAITING,
    Metric,
    StageMetrics,
    TrainingMetrics,
    to_ray,
)
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob, run_shards
from pipelines.runtime.session import StageError
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar
from pipelines.shards.tars import tar_shard
from repfusion.training.meters import Report

REPORT = Report(
    step=3,
    loss=0.5,
    other_losses={},
    grad_norm=1.0,
    lr=1e-4,
    samples_per_sec=20.0,
    step_sec=0.4,
    data_wait=0.25,
    memory_gib=1.0,
    samples_seen=24,
    epochs=1.0,
    tflops=0.1,
    mfu=0.4,
    loss_by_noise={},
)


class Told:
    """Keeps what is told: counters summed, of gauges every value."""

    def __init__(self) -> None:
        self.sums: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = defaultdict(float)
        self.values: dict[Metric, list[float]] = defaultdict(list)

    def __call__(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        assert labels.keys() == {*metric.labels}
        self.sums[metric, frozenset(labels.items())] += value
        self.values[metric].append(value)

    def sum(self, metric: Metric, **labels: str) -> float:
        return sum(
            value for (one, found), value in self.sums.items() if one is metric and labels.items() <= found
        )


class Halver:
    """Makes shards of which it drops every other sample; one shard it cannot make."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, job: ShardJob) -> Sidecar:
        if job.name == "00002":
            raise ValueError("not this one")
        with ShardCommit(self.folder, job.name, job.fingerprint, {}) as commit:
            with tar_shard(commit) as tar:
                for index in range(4):
                    if index % 2:
                        commit.drop(f"{index:09d}", "odd")
                        continue
                    tar.write(f"{index:09d}", {"txt": b"text"})
            commit.write_drops()
            return commit.commit(f"{job.name}.tar")


def test_the_pool_tells_what_became_of_every_shard(
    pool: ActorPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told, folder = Told(), Folder(str(tmp_path))
    monkeypatch.setattr(pool_module, "to_ray", lambda: told)
    jobs = [ShardJob(f"{number:05d}", "f") for number in range(4)]
    started = time.monotonic()
    with pytest.raises(StageError, match="1 of 4 shards failed"):
        run_shards(pool, "halve", Halver, {"folder": folder}, jobs, ActorsConfig(num_actors=2), 0, "w")
    seconds = time.monotonic() - started
    of = {"workflow": "w", "stage": "halve"}
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
    assert told.sum(SAMPLES, **of) == 6 and told.sum(BYTES, **of) == size
    assert told.sum(DROPS, **of, reason="odd") == 6 == told.sum(DROPS)
    assert told.values[FAILED][-1] == 1
    assert told.values[UNFINISHED][0] == 4 and told.values[UNFINISHED][-1] == 0 == told.values[WAITING][-1]
    assert sorted(told.values[UNFINISHED], reverse=True) == told.values[UNFINISHED]
    spent = {state: told.sum(ACTOR_SECONDS, **of, state=state) for state in ("busy", "idle", "starting")}
    assert spent["busy"] > 0 and sum(spent.values()) <= 2 * seconds


def test_time_goes_to_the_state_in_which_an_actor_was():
    told = Told()
    with StageMetrics(told, "w", "s") as metrics:
        metrics.look({"busy": 2, "idle": 1}, 5, 7)
        time.sleep(0.1)
        metrics.look({"idle": 3}, 0, 0)
        time.sleep(0.05)
    busy, idle = (told.sum(ACTOR_SECONDS, state=state) for state in ("busy", "idle"))
    assert busy == pytest.approx(0.2, abs=0.05) and idle == pytest.approx(0.25, abs=0.08)
    assert told.values[WAITING] == [5, 0, 0]


def test_a_training_is_told_of_under_its_workflow_s_name(tmp_path: Path):
    told = Told()
    metrics = TrainingMetrics(told, tmp_path / "demo" / "train")
    metrics.report(REPORT)
    metrics.report(Report(**{**vars(REPORT), "step": 4, "mfu": None}))
    metrics.checkpoint(1.5)
    metrics.left(2)
    metrics.evaluation(False, 1)
    metrics.evaluation(True, 0)
    of = {"workflow": "demo", "training": "train"}
    assert told.values[STEP] == [3, 4] and told.values[MFU] == [0.4], "on a CPU there is no peak"
    assert told.values[LOSS] == [0.5, 0.5] and told.values[CHECKPOINT_SECONDS] == [1.5]
    assert told.values[STEPS_LEFT] == [2] and told.values[FAILURES_IN_A_ROW] == [1, 0]
    assert told.sum(EVALUATIONS, **of, status="failed") == 1 == told.sum(EVALUATIONS, **of, status="finished")


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
        TrainingMetrics(to_ray(), tmp_path / "by_hand" / "train").report(REPORT)
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
