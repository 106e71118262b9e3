"""Kind `slurm`: a job of SLURM for each submission, which starts Ray on its own whole nodes and ends it."""

import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from cluster.config import BaseCluster, ClusterError, NodeConfig, option_words
from cluster.record import folder_of, token_file
from cluster.submission import Submission, prepare
from repfusion.config import Strict
from repfusion.files import write_json, write_text
from repfusion.locks import JOB

FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


class SlurmCluster(BaseCluster):
    """Jobs of SLURM. The working directory of `submit` has to be one that all nodes see."""

    kind: Literal["slurm"]
    num_nodes: int = Field(default=1, ge=1)
    """Whole nodes of a job."""
    node: NodeConfig = NodeConfig()
    """What Ray sees of each node."""
    python: str = ".venv/bin/python"
    """On every node, relative to the working directory."""
    partition: str | None = None
    account: str | None = None
    gres: str | None = None
    """Generic resources of a node as SLURM knows them, such as gpu:8."""
    time_limit: str | None = None
    """Limit of a job as SLURM writes it: days-hours:minutes:seconds."""
    warning_sec: int = Field(default=300, ge=1)
    """How long before the time limit, or before a preemption, the job is asked to write its checkpoint; it
    then goes back to the queue.
    """
    port: int = Field(default=6379, ge=1024, le=65535)
    """Port of Ray's head: `--exclusive` keeps other jobs off the nodes."""
    setup: list[str] = []
    """Lines of shell before Ray starts, such as `module load cuda`."""
    token: bool = True
    """Whether Ray asks for a token."""


class SlurmJob(Strict):
    """What is kept of a submission."""

    job: str
    slurm_id: str
    workflow: str
    root: str
    commit: str


class Slurm:
    """Submissions to SLURM."""

    def __init__(self, name: str, config: SlurmCluster):
        self.name, self.config = name, config

    @property
    def folder(self) -> Path:
        """Scripts, logs and records of the jobs."""
        return folder_of(self.name) / "jobs"

    def up(self) -> None:
        print(_call("sinfo", "--summarize", *self._partition()), end="")
        print(f"{self.name} needs no start: each job starts Ray on its own nodes and ends it")

    def status(self) -> bool:
        print(_call("sinfo", "--summarize", *self._partition()), end="")
        self.jobs()
        return True

    def submit(self, workflow: Path, overrides: Sequence[str], follow: bool) -> bool:
        submission = prepare(self.config, workflow, overrides)
        if (stages := submission.finished()) is not None:
            print(f"nothing to do: all {stages} stages of {workflow} are fresh in {submission.config.root}")
            return True
        root = submission.metadata["root"]
        for other in self._records():
            if other.root == root and (state := self._state(other)) not in FINISHED:
                print(f"{workflow} is at work already: job {other.job}, {state}")
                return self._follow(other) if follow else True
        record = self._handed_over(submission)
        print(f"submitted {record.job} to {self.name} as {record.slurm_id}, commit {record.commit}")
        return self._follow(record) if follow else True

    def _handed_over(self, submission: Submission) -> SlurmJob:
        script = self.folder / f"{submission.job}.sh"
        token = token_file(self.name) if self.config.token else None
        write_text(script, batch_script(self.config, submission, self.folder.resolve(), token), mode=0o700)
        number = _call("sbatch", "--parsable", str(script)).strip().partition(";")[0]
        values = submission.metadata
        record = SlurmJob(job=submission.job, slurm_id=number, **values)
        write_json(self.folder / f"{submission.job}.json", record.model_dump())
        return record

    def jobs(self) -> None:
        for one in (records := self._records()):
            print(f"{one.job} {self._state(one):<10} {one.slurm_id:>8} {one.commit[:12]} {one.workflow}")
        if not records:
            print(f"{self.name} has no jobs yet: make submit W=workflow.yaml CLUSTER={self.name}")

    def logs(self, job: str, follow: bool) -> bool:
        record = self._get(job)
        if follow:
            return self._follow(record)
        log = self.folder / f"{job}.log"
        print(log.read_text(errors="replace") if log.is_file() else "(it has not started)")
        return True

    def cancel(self, job: str) -> None:
        """Asks the driver to end, and takes the job out of the queue where it never started."""
        record = self._get(job)
        state = self._state(record)
        if state == "PENDING":
            _call("scancel", record.slurm_id)
        elif state not in FINISHED:
            _call("scancel", "--batch", "--signal=USR1", record.slurm_id)
            start = time.monotonic()
            while (state := self._state(record)) not in FINISHED:
                if time.monotonic() - start > self.config.stop_sec + 60:
                    raise ClusterError(
                        f"{job} was asked to end and is still {state}; scancel {record.slurm_id}"
                    )
                time.sleep(2)
        print(f"{job}: {self._state(record)}")

    def down(self) -> None:
        for record in self._records():
            if self._state(record) not in FINISHED:
                self.cancel(record.job)
        print(f"{self.name}: no job of this folder is left")

    def render(self) -> dict[str, str]:
        example = prepare(self.config, Path("pipelines/configs/demo.yaml"), ())
        return {f"{self.name}.sh": batch_script(self.config, example, self.folder.resolve(), None)}

    def _partition(self) -> list[str]:
        return [f"--partition={self.config.partition}"] if self.config.partition else []

    def _records(self) -> list[SlurmJob]:
        try:
            paths = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
            return [SlurmJob.model_validate_json(path.read_bytes()) for path in paths]
        except ValidationError as error:
            raise ClusterError(f"{self.folder}: no record of a job: {error.errors()[0]['msg']}") from error

    def _get(self, job: str) -> SlurmJob:
        found = {one.job: one for one in self._records()}
        if job not in found:
            raise ClusterError(f"{self.name} has no job {job!r}; there are: {', '.join(found) or 'none'}")
        return found[job]

    def _state(self, record: SlurmJob) -> str:
        """What the script wrote when it ended; before that, SLURM's own word for it."""
        ended = self.folder / f"{record.job}.state"
        if ended.is_file():
            return ended.read_text().strip()
        try:
            state = _call("squeue", "--noheader", "--format=%T", f"--jobs={record.slurm_id}").strip()
        except ClusterError as error:
            if "Invalid job id" not in str(error):
                raise
            state = ""
        # neither in the queue nor at its end: it was killed, or its node was
        return state or "FAILED"

    def _follow(self, record: SlurmJob) -> bool:
        log, said = self.folder / f"{record.job}.log", 0
        while True:
            state = self._state(record)
            if log.is_file():
                with log.open(errors="replace") as stream:
                    stream.seek(said)
                    print(stream.read(), end="", flush=True)
                    said = stream.tell()
            if state in FINISHED:
                print(f"{record.job}: {state}")
                return state == "SUCCEEDED"
            time.sleep(2)


def _call(*words: str) -> str:
    """What a command of SLURM says. Raises ClusterError where it fails, or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError(
            f"{words[0]} is not on this machine; kind slurm is submitted from one of SLURM's login nodes"
        ) from error
    if done.returncode:
        raise ClusterError(
            f"{words[0]} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def batch_script(config: SlurmCluster, submission: Submission, folder: Path, token: Path | None) -> str:
    """The script for sbatch. Of its traps:

    TERM    SLURM warns of the time limit or of a preemption: the driver alone is asked to write its
            checkpoint (to signal the whole step would end Ray under it), and the job goes back to the
            queue, to go on from there
    USR1    `make cancel`: the same, and the job ends

    `ray symmetric-run` ends with 0 where Ray did not start, so that the driver leaves a file.
    """
    job = submission.job
    started, state = folder / f"{job}.started", folder / f"{job}.state"
    driver = shlex.join(submission.words(config.python))
    options = shlex.join(option_words(config.node.start_options()))
    inner = f"echo $$ > {shlex.quote(str(started))}; exec {driver}"
    variables = {
        **config.environment,
        JOB: job,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "300",
        "RAY_AUTH_MODE": "disabled" if token is None else "token",
        **({} if token is None else {"RAY_AUTH_TOKEN_PATH": str(token)}),
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {one}" for one in _directives(config, job, folder)),
        f"# {submission.workflow}, commit {submission.commit}",
        "set -u",
        'cd "$SLURM_SUBMIT_DIR"',
        f"rm -f {shlex.quote(str(started))} {shlex.quote(str(state))}",
        *config.setup,
        # `ray symmetric-run` calls `ray` by its bare name
        f'export PATH="$(cd {shlex.quote(str(Path(config.python).parent))} && pwd):$PATH"',
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "head=${nodes%%$'\\n'*}",
        f'export RAY_ADDRESS="$head:{config.port}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "asked=",
        "ask() {",
        '    asked=$1; echo "asked to end ($1): the driver writes its checkpoint"',
        "    # the batch step runs on the first node, as the head and the driver do",
        f'    kill -TERM "$(cat {shlex.quote(str(started))})" 2>/dev/null || kill -TERM $step',
        "}",
        "trap 'ask requeue' TERM",
        "trap 'ask cancel' USR1",
        f"srun --nodes={config.num_nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 \\",
        f'    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes {config.num_nodes} {options} \\',
        f"    -- /bin/sh -c {shlex.quote(inner)} &",
        "step=$!",
        "# a trapped signal ends `wait`, not what is waited for",
        "wait $step; status=$?",
        "while kill -0 $step 2>/dev/null; do wait $step; status=$?; done",
        f"[ -e {shlex.quote(str(started))} ] || {{ echo 'Ray did not start'; status=1; }}",
        'case "$asked,$status" in',
        "    requeue,*) echo 'back to the queue'; exec scontrol requeue \"$SLURM_JOB_ID\" ;;",
        f"    cancel,*) echo STOPPED > {shlex.quote(str(state))} ;;",
        f"    *,0) echo SUCCEEDED > {shlex.quote(str(state))} ;;",
        f"    *) echo FAILED > {shlex.quote(str(state))} ;;",
        "esac",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"


def _directives(config: SlurmCluster, job: str, folder: Path) -> list[str]:
    """Options of sbatch: whole nodes, one task each, warned in time, put back into the queue."""
    optional = {
        "partition": config.partition,
        "account": config.account,
        "gres": config.gres,
        "time": config.time_limit,
    }
    return [
        f"--job-name={job}",
        f"--output={folder / job}.log",
        "--open-mode=append",
        f"--nodes={config.num_nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--requeue",
        f"--signal=B:TERM@{config.warning_sec}",
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
    ]
