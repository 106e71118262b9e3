"""Stages on actors with a GPU: the other tests' workflow, two actors that share it, one that is killed."""

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import manifests, run_all

from pipelines.runtime.pool import ActorsConfig, ShardJob, run_shards
from pipelines.shards.storage import Folder
from pipelines.shards.tars import read_samples
from pipelines.stages.image_features import ImageFeaturesConfig, ImageFeaturesWorker
from repfusion.latents.load import EncoderConfig

pytestmark = [pytest.mark.gpu, pytest.mark.ray]
SHARE = {"num_gpus": 0.5, "num_cpus": 0.5}


def features(folder: Folder, names: list[str], column: str) -> dict[str, np.ndarray]:
    """Arrays of a column, by key."""
    found = {}
    for name in names:
        for key, members in read_samples(folder, f"{name}.tar"):
            arrays = {file: data for file, data in members.items() if file.endswith("npy")}
            found.update((f"{key}.{file}", np.load(io.BytesIO(data))) for file, data in arrays.items())
    assert found, column
    return found


def test_the_workflow_on_actors_with_a_gpu(make_config, pool):
    """Image and prompt features in bfloat16, compiled, by two actors each; then training and evaluation."""
    plain, _ = run_all(make_config("cpu"), pool)
    actors = {"actors": {**SHARE, "num_actors": 2}}
    columns = {
        "image_features": {"kind": "image_features", **actors},
        "prompt_features": {"kind": "prompt_features", "mllm_dtype": "auto", **actors},
    }
    config = make_config(
        "gpu",
        columns=columns,
        last_stage="report",
        trainings={"train": {"num_workers": 1, "num_steps": 4, "global_batch_size": 8}},
        evaluate={"suites": {"scenes": {"num_prompts": 6}}, "sampler": {"num_steps": 2}, "batch_size": 6},
    )
    results, _ = run_all(config, pool)
    ours, theirs = manifests(results), manifests(plain)
    for column, most in (("image_features", 0.05), ("prompt_features", 0.05)):
        assert ours[column].samples == theirs[column].samples
        names = [f"{shard:05d}" for shard in range(4)]
        made, expected = (
            features(Folder.at(one.root / column), names, column) for one in (config, make_config("cpu"))
        )
        assert made.keys() == expected.keys()
        errors = [np.abs(made[key].astype(np.float32) - expected[key]).mean() for key in made]
        assert 0 < np.mean(errors) < most


class Killed(ImageFeaturesWorker):
    """Kills its actor once, in the middle of a shard."""

    def __call__(self, job: ShardJob) -> Any:
        mark = Path(self.folder.path, "killed")
        if job.name == "00001" and not mark.exists():
            mark.touch()
            torch.zeros(1 << 28, device="cuda")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(job)


def test_an_actor_that_is_killed_leaves_the_gpu_to_another(run_copy, pool, models, tmp_path):
    source = Folder.at(run_copy.root / "curate")
    folder = Folder.at(tmp_path / "image_features")
    folder.path.mkdir()
    actors = ActorsConfig(num_actors=1, num_cpus=1, num_gpus=1)
    arguments = {
        "folder": folder,
        "source": source,
        "config": ImageFeaturesConfig(batch_size=4, actors=actors, compile=False),
        "encoder": EncoderConfig(path=models["tower"]),
    }
    names = [f"{shard:05d}" for shard in range(4)]
    jobs = [ShardJob(name, "f") for name in names]
    assert sorted(run_shards(pool, "image_features", Killed, arguments, jobs, actors)) == names
    assert len(features(folder, names, "image_features")) == 34
    pool.close()
    began = time.monotonic()
    while torch.cuda.mem_get_info()[0] < 0.8 * torch.cuda.mem_get_info()[1]:
        assert time.monotonic() - began < 60, "the killed actor's memory was not given back"
        time.sleep(1)
