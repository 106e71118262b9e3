"""The script for SLURM on a real slurmd: data stages and a short training, asked to make room in both, put
back into the queue, and on to the end; the same bytes as without.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from running import data_files
from safetensors.torch import load_file
from slurm_site import SlurmSite, missing, slurm_site

from pipelines.shards.storage import Folder
from repfusion.runs.folder import complete_checkpoints

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif((why := missing()) is not None, reason=why or ""),
]
ROOT = Path(__file__).parents[2]
LIMIT_SEC = 1800.0
STEPS, EVERY = 120, 20
WORKFLOW = {
    "root": "runs/small",
    "last_stage": "train",
    "evaluate": {"beside_training": False},
    "source": {"kind": "scenes", "num_samples": 60, "shard_size": 10},
    "trainings": {
        "train": {
            "model": {"dit": {"hidden_size": 96, "depth": 1, "num_heads": 2}},
            "engine": {"precision": "fp32", "micro_batch_size": 4, "num_threads": 1, "warmup_steps": 1},
            "tracking": {"uri": None},
            **{"global_batch_size": 4, "num_steps": STEPS, "checkpoint_every_steps": EVERY},
            **{"log_every_steps": 1, "num_workers": 1},
        }
    },
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    with slurm_site(tmp_path_factory.mktemp("slurm")) as site:
        yield site


class User:
    """A folder of somebody who submits to the site."""

    def __init__(self, site: SlurmSite, folder: Path):
        self.site, self.folder = site, folder
        (folder / "flow.yaml").write_text(yaml.safe_dump(WORKFLOW))
        cluster = {
            "kind": "slurm",
            "partition": "cpu",
            "python": sys.executable,
            "node": {"num_cpus": 2, "object_store_mib": 80},
            # Ray starts its workers at nice 15, beside whatever else this machine does
            "environment": {"RAY_worker_niceness": "0"},
        }
        (folder / "site.yaml").write_text(yaml.safe_dump(cluster))

    def cluster(self, *words: str, code: int = 0) -> str:
        path = f"PYTHONPATH={os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}"
        command = ["env", path, sys.executable, "-m", "cluster", *words, "--cluster", "site.yaml"]
        return self.site.call(*command, folder=self.folder, code=code)

    def submit(self, *overrides: str) -> tuple[str, str]:
        """The job's name and SLURM's number of it."""
        said = self.cluster("submit", "flow.yaml", *overrides)
        words = said.split()
        return words[words.index("submitted") + 1], words[words.index("as") + 1].rstrip(",")

    def ended(self, job: str) -> str:
        """How a job ended."""
        path = self.folder / f"runs/clusters/site/jobs/{job}.state"
        end = time.monotonic() + LIMIT_SEC
        while not path.is_file():
            assert time.monotonic() < end, self.log(job)
            time.sleep(1)
        return path.read_text().strip()

    def log(self, job: str) -> str:
        path = self.folder / f"runs/clusters/site/jobs/{job}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def until(self, condition: Callable[[], object], job: str) -> None:
        """Waits for a moment of a job, which must not be over before."""
        end = time.monotonic() + LIMIT_SEC
        while not condition():
            assert not (self.folder / f"runs/clusters/site/jobs/{job}.state").exists(), self.log(job)
            assert time.monotonic() < end, self.log(job)
            time.sleep(0.1)

    def preempt(self, number: str, job: str, times: int) -> None:
        """Asks for room as a preemption does, and lets the job, back in the queue, start at once: SLURM would
        wait two minutes.
        """
        self.site.call("scancel", "--batch", "--signal=TERM", number)
        self.until(lambda: self.log(job).count("back to the queue") == times, job)
        self.until(lambda: "PENDING" in self.site.call("squeue", "--noheader", "--format=%T"), job)
        self.site.call("scontrol", "update", f"JobId={number}", "StartTime=now")

    def data(self, root: str) -> dict[str, bytes]:
        return data_files(Folder(str(self.folder / "runs" / root)))

    def checkpoints(self, root: str) -> list[Path]:
        return complete_checkpoints(self.folder / "runs" / root / "train/checkpoints")


def test_a_job_that_makes_room_twice_ends_as_one_that_never_did(site: SlurmSite, tmp_path: Path):
    user = User(site, tmp_path)
    assert "site needs no start" in user.cluster("up")
    job, _ = user.submit("root=runs/calm")
    assert user.ended(job) == "SUCCEEDED", user.log(job)

    job, number = user.submit()
    user.until(lambda: (tmp_path / "runs/small/judge/00000.json").exists(), job)
    user.preempt(number, job, times=1)
    assert user.checkpoints("small") == []
    user.until(lambda: user.checkpoints("small"), job)
    user.preempt(number, job, times=2)
    stopped_at = user.checkpoints("small")[-1].name
    assert user.ended(job) == "SUCCEEDED", user.log(job)

    summary = json.loads((tmp_path / "runs/small/train/train.json").read_text())
    assert summary["steps"] == STEPS and f"step_{summary['resumed_at_step']:08d}" == stopped_at
    assert user.data("small") == user.data("calm")
    calm, small = user.checkpoints("calm")[-1], user.checkpoints("small")[-1]
    for name in ("model", "ema"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (calm, small))
        assert [key for key in one if not one[key].equal(two[key])] == []
    assert "nothing to do: all" in user.cluster("submit", "flow.yaml")
