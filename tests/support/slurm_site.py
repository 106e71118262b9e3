"""A real SLURM of one node on this machine: munged, slurmctld and slurmd of Debian's `slurm-wlm`, in
namespaces of their own. There they have a loopback and no other network, and see no process but theirs: `ray
symmetric-run` refuses where another Ray runs, and its `ray stop` ends every Ray that it sees.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
START_SEC = 120.0
PORTS = 36817, 36818
INIT = """
ip link set lo up
ip address add 192.0.2.1/32 dev lo  # without an address beside 127.0.0.1 nothing resolves
munged --foreground --force --num-threads 2 --socket {folder}/munge.socket --key-file {folder}/key \
    --pid-file {folder}/munged.pid --log-file {folder}/munged.log --seed-file {folder}/munged.seed &
until [ -S {folder}/munge.socket ]; do sleep 0.1; done
slurmctld -D &
slurmd -D -N localhost &
wait
"""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
KillWait=5
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=cpu Nodes=localhost Default=YES State=UP
"""


def missing() -> str | None:
    """Why there can be no such site here; None where there can."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge, util-linux, iproute2)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], check=False)
    return "this user may make no namespaces" if tried.returncode else None


@dataclass(frozen=True)
class SlurmSite:
    folder: Path
    init: int
    """Number of the first process of the namespaces."""

    def call(self, *words: str, folder: Path = Path("/"), code: int = 0, timeout_sec: float = 600.0) -> str:
        """What a command on the site's login node says; its status has to be `code`."""
        inside = ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount"]
        there = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        done = subprocess.run(
            [*inside, *there, *words],
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_sec,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout


@contextmanager
def slurm_site(folder: Path) -> Iterator[SlurmSite]:
    """The site, from when its node is idle; all that runs on it ends with the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o600)
    values = {"folder": folder, "host": socket.gethostname(), "ports": PORTS, "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(CONF.format(**values))
    words = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*words, "bash", "-c", INIT.format(**values)],
            env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        site = SlurmSite(folder, _child_of(process.pid))
        _wait_for_idle(site, folder / "log")
        yield site
    finally:
        process.kill()
        process.wait()


def _child_of(pid: int) -> int:
    end = time.monotonic() + START_SEC
    while time.monotonic() < end:
        if found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(found[0])
        time.sleep(0.05)
    raise TimeoutError("unshare started nothing")


def _wait_for_idle(site: SlurmSite, log: Path) -> None:
    end, said = time.monotonic() + START_SEC, ""
    while time.monotonic() < end:
        try:
            said = site.call("sinfo", "--noheader", "--format=%T")
        except AssertionError as error:
            said = str(error)
        if said.strip() == "idle":
            return
        time.sleep(0.2)
    raise TimeoutError(f"{said}\n{log.read_text(errors='replace')}")
