"""A training that loses a rank or a node, is told to stop, or meets an error of its own: what it ends in, and
that nothing is left running.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import LOOPBACK, listening_addresses, run_command, tagged_process, wait_until_gone
from ranks import Job, Ranks, rank_server
from running import until
from tiny_training import GRID, WIDTH, make_columns, make_foundation, npy, scan_and_replace, tiny_train
from traced_training import RankTrace, read_traces, trace_ranks

import pipelines.runtime.ranks
from pipelines.config import WorkflowConfig
from pipelines.runtime.session import StageError
from repfusion.config import to_yaml, validate
from repfusion.runs.folder import RunFolder, complete_checkpoints, latest_checkpoint, step_of
from repfusion.train import TrainConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[3]
LIMIT_SEC = 400
NUM_SAMPLES, BATCH = 24, 8
"""Three steps are an epoch."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("faults")
    return make_foundation(root / "weights"), make_columns(root / "data", num_samples=NUM_SAMPLES)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with rank_server() as server:
        yield server


def workflow(
    root: Path, train: TrainConfig, settings: dict[str, Any] | None = None, **changes: Any
) -> WorkflowConfig:
    """`settings` are further fields of the training, `changes` other sections."""
    values = train.model_dump(mode="json", exclude={"tracking", "output_dir"})
    return validate(
        WorkflowConfig,
        {
            "root": root,
            "last_stage": "train",
            "trainings": {"train": {**values, "tracking": {"uri": None}, **(settings or {})}},
            "evaluate": {"beside_training": False},
            "ray": {"num_cpus": 2, "object_store_mib": 80},
            **changes,
        },
    )


def tag_of(root: Path) -> str:
    return f"{os.getpid()}-{root.parent.name}-{root.name}"


def start_traced(config: WorkflowConfig, **environment: str):
    """The train stage in a process of its own (a context manager); its ranks leave traces beside its root."""
    path = config.root.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "traced_training.py"),
        str(path),
        str(traces_of(config)),
    ]
    variables = {"PYTHONPATH": str(ROOT), **environment}
    return tagged_process(command, tag_of(config.root), log_of(config), variables)


def log_of(config: WorkflowConfig) -> Path:
    return config.root.with_suffix(".log")


def traces_of(config: WorkflowConfig) -> Path:
    return config.root.with_suffix(".traces")


def steps_read(attempts: list[list[RankTrace]]) -> int:
    """The latest step whose batch was read."""
    return max((read.step for ranks in attempts for rank in ranks for read in rank.reads), default=-1)


def assert_gone(config: WorkflowConfig) -> None:
    assert wait_until_gone(tag_of(config.root)) < 30
    checkpoints = config.trainings["train"].output_dir / "checkpoints"
    assert [path.name for path in checkpoints.glob(".*")] == []
    assert not RunFolder(config.trainings["train"].output_dir).stop.exists()


def weights(train: TrainConfig) -> dict[str, bytes]:
    """The files of the last checkpoint."""
    folder = latest_checkpoint(train.output_dir / "checkpoints")
    assert folder is not None and step_of(folder) == train.num_steps
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("model", "ema")}


def undisturbed(ranks: Ranks, train: TrainConfig, folder: Path) -> dict[str, bytes]:
    """Weights of the same training on two ranks, without Ray."""
    alone = train.model_copy(update={"output_dir": folder})
    assert ranks.run(Job(alone.model_dump_json(), world_size=2, log=str(folder / "log"))) == [0, 0]
    return weights(alone)


def assert_each_sample_once(attempts: list[list[RankTrace]], num_steps: int) -> None:
    """In every epoch, of what went into the weights: an attempt's steps up to where the next one begins."""
    firsts = [min(read.step for read in ranks[0].reads) for ranks in attempts]
    ends = [*firsts[1:], num_steps]
    read = [
        (read.step, key)
        for ranks, end in zip(attempts, ends, strict=True)
        for rank in ranks
        for read in rank.reads
        if read.step < end
        for key in read.keys
    ]
    assert len(read) == num_steps * BATCH
    steps_per_epoch = NUM_SAMPLES // BATCH
    for epoch in range(num_steps // steps_per_epoch):
        counts = Counter(key for step, key in read if step // steps_per_epoch == epoch)
        assert len(counts) == NUM_SAMPLES and set(counts.values()) == {1}


@pytest.mark.slow
def test_a_killed_rank_restarts_all_from_the_last_checkpoint(world, ranks, tmp_path):
    train = tiny_train(*world, tmp_path, {"micro_batch_size": 4}, num_steps=12, checkpoint_every_steps=3)
    config = workflow(tmp_path / "killed", train)
    with start_traced(config, KILL="1:7") as process:
        assert process.wait(LIMIT_SEC) == 0, log_of(config).read_text()
        assert_gone(config)
    first, second = read_traces(traces_of(config))
    assert first[1].reads[-1].step == 7 and second[0].reads[0].step == 6
    assert [rank.world_size for rank in second] == [2, 2]
    assert {rank.pid for rank in first}.isdisjoint(rank.pid for rank in second)
    assert_each_sample_once([first, second], 12)
    assert weights(config.trainings["train"]) == undisturbed(ranks, train, tmp_path / "alone")
    print(f"restart: {second[0].reads[0].time - first[1].reads[-1].time:.1f} s")


@pytest.mark.slow
def test_on_one_machine_nobody_else_reaches_the_ranks(world, tmp_path):
    train = tiny_train(*world, tmp_path, {"micro_batch_size": 4}, num_steps=3, checkpoint_every_steps=3)
    config = workflow(tmp_path / "reached", train)
    with start_traced(config, STEP_SEC="2") as process:
        until(lambda: steps_read(read_traces(traces_of(config))) >= 1, process, log_of(config))
        (ranks,) = read_traces(traces_of(config))
        assert len(ranks) == 2
        addresses = listening_addresses([rank.pid for rank in ranks])
        assert process.wait(LIMIT_SEC) == 0, log_of(config).read_text()
    assert addresses and addresses <= LOOPBACK


@pytest.mark.slow
def test_a_rank_that_dies_every_time_ends_the_training(world, tmp_path):
    train = tiny_train(*world, tmp_path, {"micro_batch_size": 4}, num_steps=6)
    config = workflow(tmp_path / "dying", train, {"max_failures": 1})
    with start_traced(config, KILL="1:3", KILL_TIMES="9") as process:
        assert process.wait(LIMIT_SEC) == 1, log_of(config).read_text()
        assert_gone(config)
    (error,) = [line for line in log_of(config).read_text().splitlines() if line.startswith("error:")]
    assert "error: train: rank 1: " in error and "died" in error
    assert len(read_traces(traces_of(config))) == 2
    assert [
        step_of(path) for path in complete_checkpoints(config.trainings["train"].output_dir / "checkpoints")
    ] == [2]


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_checkpoint_and_a_rank(world, nodes, tmp_path):
    train = tiny_train(*world, tmp_path, {"micro_batch_size": 4}, num_steps=12)
    stays, goes = nodes.add(num_cpus=1), nodes.add(num_cpus=1)
    ray_config = {"address": nodes.cluster.address}
    config = workflow(tmp_path / "shrinking", train, {"num_workers": [1, 2]}, ray=ray_config)
    with start_traced(config, STEP_SEC="0.5") as process:
        until(lambda: steps_read(read_traces(traces_of(config))) >= 5, process, log_of(config))
        nodes.kill(goes)
        killed = time.time()
        assert process.wait(LIMIT_SEC) == 0, log_of(config).read_text()
        assert_gone(config)
    first, *rest = read_traces(traces_of(config))
    assert {rank.node for rank in first} == {stays, goes}
    last = rest[-1]
    assert [rank.node for rank in last] == [stays]
    assert_each_sample_once([first, last], 12)
    assert [
        step_of(path) for path in complete_checkpoints(config.trainings["train"].output_dir / "checkpoints")
    ][-1] == 12
    print(f"restart: {last[0].reads[0].time - killed:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all", "code"), [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)]
)
def test_a_signal_leaves_a_checkpoint_of_the_moment(
    run_copy, configure, ranks, tmp_path, number, to_all, code
):
    """`python -m pipelines run`; a terminal's Ctrl-C reaches Ray's processes too."""
    root = run_copy.root
    settings = {
        "engine": {"precision": "fp32", "micro_batch_size": 4, "num_threads": 1, "warmup_steps": 2},
        "model": {"conditioning": "noisy_latents", "dit": {"hidden_size": 32, "depth": 2, "num_heads": 2}},
        "global_batch_size": 8,
        "num_steps": 300,
        "checkpoint_every_steps": 250,
        "log_every_steps": 1,
        "tracking": {"uri": None},
    }
    config = configure(
        root, last_stage="train", trainings={"train": settings}, evaluate={"beside_training": False}
    )
    path, log = tmp_path / "workflow.yaml", log_of(config)
    path.write_text(to_yaml(config))
    progress = RunFolder(config.trainings["train"].output_dir).progress
    with tagged_process(run_command(path), tag_of(root), log) as process:
        until(progress.exists, process, log)
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(120) == code, log.read_text()
        assert_gone(config)
    assert "Traceback" not in log.read_text()
    (stopped,) = complete_checkpoints(config.trainings["train"].output_dir / "checkpoints")
    assert 0 < step_of(stopped) < 250
    with tagged_process(run_command(path), tag_of(root), log) as process:
        assert process.wait(LIMIT_SEC) == 0, log.read_text()
        assert_gone(config)
    assert (
        f'"resumed_at_step": {step_of(stopped)},'
        in (config.trainings["train"].output_dir / "train.json").read_text()
    )
    assert weights(config.trainings["train"]) == undisturbed(
        ranks, config.training("train"), tmp_path / "alone"
    )


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(world, tmp_path):
    config = workflow(tmp_path / "hasty", tiny_train(*world, tmp_path, {"micro_batch_size": 4}))
    with start_traced(config, STEP_SEC="100") as process:
        until(lambda: steps_read(read_traces(traces_of(config))) >= 0, process, log_of(config))
        os.killpg(process.pid, signal.SIGINT)
        stop = RunFolder(config.trainings["train"].output_dir).stop
        until(stop.exists, process, log_of(config))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log_of(config).read_text()
        assert wait_until_gone(tag_of(config.root)) < 30
    assert complete_checkpoints(config.trainings["train"].output_dir / "checkpoints") == []


@pytest.mark.slow
def test_an_error_of_our_own_is_said_once_and_not_repeated(ray_local, pool, world, tmp_path, monkeypatch):
    pool.close()  # its idle actors hold the CPUs
    data = make_columns(tmp_path / "data", num_samples=NUM_SAMPLES)
    bad = np.zeros((GRID**2, WIDTH), np.float16)
    bad[1, 2] = np.nan
    scan_and_replace(data / "image_features" / "00001.tar", "000012.image_features.npy", npy(bad))
    train = tiny_train(
        world[0], data, tmp_path / "nan", {"micro_batch_size": 4}, num_steps=6, checkpoint_every_steps=1
    )
    monkeypatch.setattr(pipelines.runtime.ranks, "train_rank", trace_ranks(tmp_path / "nan.traces"))
    with pytest.raises(
        StageError, match=r"^train: rank \d: NonFiniteError: step 1: the loss .*: 000012\. [^\n]*$"
    ):
        pipelines.runtime.ranks.launch(train, 2, max_failures=3)
    assert len(read_traces(tmp_path / "nan.traces")) == 1
    assert [step_of(path) for path in complete_checkpoints(train.output_dir / "checkpoints")] == [1]

    monkeypatch.setattr(pipelines.runtime.ranks, "train_rank", trace_ranks(tmp_path / "base.traces"))
    missing = train.model_copy(update={"output_dir": tmp_path / "base", "init_from": tmp_path / "none"})
    with pytest.raises(StageError, match=r"^train: rank 0: ValueError: [^\n]*none does not exist[^\n]*$"):
        pipelines.runtime.ranks.launch(missing, 1, max_failures=3)
    assert len(read_traces(tmp_path / "base.traces")) == 1


@pytest.mark.slow
def test_ranks_that_do_not_share_the_folder_end_with_what_is_wrong(world, ranks, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    train = tiny_train(*world, Path("out"), {"micro_batch_size": 4})
    job = Job(train.model_dump_json(), 2, str(tmp_path / "log"), folders=tuple(map(str, folders)))
    assert ranks.run(job) == [1, 1]
    for rank in range(2):
        said = (tmp_path / "log" / f"{rank}.log").read_text()
        assert (
            "CheckpointError: out/checkpoints: the checkpoint of step 2 could not be written: rank 1" in said
        )
        assert "see that every rank has this folder" in said
    assert [path.name for path in (folders[0] / "out" / "checkpoints").iterdir()] == []
