"""The ranks of one machine listen on loopback alone, whatever they are told of the machine's address."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import LOOPBACK
from programs import outputs

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import sys
from pathlib import Path
from repfusion.training.distributed import broadcast_object, init_process_group
from repfusion.training.distributed import prepare_environment, shut_down

prepare_environment()
init_process_group()
assert broadcast_object("agreed") == "agreed"
own = {Path(handle).readlink().name for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()}
for name in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            print("listens", words[1].partition(":")[0])
broadcast_object(None)  # both have looked
shut_down()
"""


@pytest.mark.parametrize(
    "address",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("127.0.0.1", "localhost")), "192.0.2.1"],
)
def test_nothing_listens_beyond_loopback(address, free_port):
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": address, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **environment, "MASTER_PORT": str(free_port)}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [output.split() for output in outputs(started)]
    assert [process.returncode for process in started] == [0, 0]
    listening = {word for words in said for word in words if word != "listens"}
    assert listening and listening <= LOOPBACK
    assert len(said[0]) > len(said[1])  # the store is rank 0's
