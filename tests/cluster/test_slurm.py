"""The script for SLURM as bash carries it out. SLURM is not needed: its commands, Ray and the driver are
small scripts of shell here; the script and what `make` calls are the real ones.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.commands import main
from cluster.kinds.processes import wait_until

SBATCH = r"""#!/bin/bash
script=$(realpath "${@: -1}")
log=$(sed -n 's/^#SBATCH --output=//p' "$script")
SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NODELIST=n SLURM_SCRIPT=$script \
    setsid bash -c 'SLURM_JOB_ID=$$ exec bash "$SLURM_SCRIPT"' >>"$log" 2>&1 </dev/null &
echo "$!;site"
"""
SQUEUE = r"""#!/bin/bash
id=${@: -1}; kill -0 "${id#--jobs=}" 2>/dev/null && echo RUNNING
exit 0
"""
SCONTROL = r"""#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) SLURM_RESTART_COUNT=1 exec bash "$SLURM_SCRIPT" ;;
esac
"""
SCANCEL = '#!/bin/bash\n[ "$1" = --batch ] && kill "-${2#--signal=}" "$3"\n'
SRUN = '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@"\n'
RAY = '#!/bin/bash\n[ -e no_ray ] && exit 0\nwhile [ "$1" != -- ]; do shift; done; shift\n"$@"\n'
DRIVER = r"""#!/bin/bash
echo "driver $* at $RAY_ADDRESS in mode $RAY_AUTH_MODE for $REPFUSION_JOB"
[ -e fails ] && exit 3
[ -e quick ] || [ -e checkpoint ] && echo "goes on to the end" && exit 0
trap 'echo "writes its checkpoint"; touch checkpoint; exit 143' TERM
touch at_work
while true; do sleep 0.1; done
"""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a workflow, a cluster and the commands of a site, which come before all others."""
    scripts = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "scancel": SCANCEL, "srun": SRUN}
    own = {".venv/bin/ray": RAY, ".venv/bin/python": DRIVER}
    for name, text in {**{f"bin/{name}": text for name, text in scripts.items()}, **own}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"root": "runs/small", "last_stage": "ingest"}))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"kind": "slurm", "stop_sec": 5}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main([*words, "--cluster", "site.yaml"]) == code
    said = capsys.readouterr()
    return said.out + said.err


def submitted(capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """The name and the batch shell's pid of a job whose driver is at work."""
    words = run(capsys, "submit", "small.yaml").split()
    assert wait_until(Path("at_work").exists, 20)
    return words[1], int(words[words.index("as") + 1].rstrip(","))


def test_a_job_that_ends_well_is_followed_to_its_end(capsys):
    Path("quick").touch()
    said = run(capsys, "submit", "small.yaml", "seed=3", "--follow", code=1)
    assert "unknown key 'seed'" in said
    said = run(capsys, "submit", "small.yaml", "curate.max_caption_chars=60", "--follow")
    assert "driver -m pipelines run small.yaml curate.max_caption_chars=60 at localhost:6379" in said
    assert "in mode token for small-" in said and said.rstrip().endswith(": SUCCEEDED")
    assert "SUCCEEDED" in run(capsys, "jobs")


def test_a_driver_that_fails_fails_the_job(capsys):
    Path("fails").touch()
    assert ": FAILED" in run(capsys, "submit", "small.yaml", "--follow", code=1)


def test_ray_that_does_not_start_fails_the_job_though_it_ends_with_0(capsys):
    Path("no_ray").touch()
    said = run(capsys, "submit", "small.yaml", "--follow", code=1)
    assert "Ray did not start" in said and ": FAILED" in said


def test_a_warning_becomes_a_checkpoint_and_the_job_goes_on_from_it(capsys):
    job, pid = submitted(capsys)
    assert "is at work already: job " + job in run(capsys, "submit", "small.yaml")
    os.kill(pid, signal.SIGTERM)
    said = run(capsys, "logs", job, "--follow")
    wanted = ["asked to end (requeue)", "writes its checkpoint", "back to the queue", "goes on to the end"]
    places = [said.index(one) for one in wanted]
    assert places == sorted(places) and ": SUCCEEDED" in said


def test_a_cancelled_job_writes_its_checkpoint_and_is_not_put_back(capsys):
    job, _ = submitted(capsys)
    assert f"{job}: STOPPED" in run(capsys, "cancel", job)
    said = run(capsys, "logs", job)
    assert "writes its checkpoint" in said and "back to the queue" not in said
    assert "STOPPED" in run(capsys, "jobs")


def test_a_killed_job_is_known_to_have_failed(capsys):
    job, pid = submitted(capsys)
    os.killpg(pid, signal.SIGKILL)
    assert wait_until(lambda: subprocess.run(["kill", "-0", str(pid)], check=False).returncode != 0, 10)
    assert "FAILED" in run(capsys, "jobs")
    assert f"{job}: FAILED" in run(capsys, "cancel", job)


def test_down_ends_the_jobs_that_are_left(capsys):
    job, _ = submitted(capsys)
    said = run(capsys, "down")
    assert f"{job}: STOPPED" in said and "no job of this folder is left" in said
