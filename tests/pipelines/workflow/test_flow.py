"""Shards that flow through stages of a test's own: which go on at once, what a stage still waits for, and
what becomes of failures.
"""

from pathlib import Path

import pytest

from pipelines.dag import ShardStage
from pipelines.runtime.pool import ActorPool, ActorsConfig, ShardJob
from pipelines.runtime.session import RayConfig, StageError
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, read_sidecar
from pipelines.workflow.inspection import states
from pipelines.workflow.run import run

pytestmark = pytest.mark.ray


class Number:
    """Commits a shard of one byte; waits until files of other stages are there, or fails, as its arguments
    say.
    """

    def __init__(self, folder: Folder, after: dict[str, Path] = {}, fails: frozenset[str] = frozenset()):  # noqa: B006
        self.folder, self.after, self.fails = folder, after, fails

    def __call__(self, job: ShardJob) -> Sidecar:
        import time

        deadline = time.monotonic() + 60
        while (path := self.after.get(job.name)) is not None and not path.exists():
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.02)
        if job.name in self.fails:
            raise ValueError(f"{job.name} is not to be")
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs) as commit:
            (commit.staging / f"{job.name}.tar").write_bytes(job.name[-1:].encode())
            commit.samples = 1
            return commit.commit(f"{job.name}.tar")


NAMES = [f"{index:05d}" for index in range(6)]
ONE = ActorsConfig(num_actors=1)


def chain(root: Path, arguments: dict[str, dict] = {}, **fields: dict) -> list[ShardStage]:  # noqa: B006
    """Stages `first`, `second` and `third`, of six shards each; `fields` are a stage's own."""
    stages: list[ShardStage] = []
    for name in ("first", "second", "third"):
        own = {"actors": ONE, **fields.get(name, {})}
        if not stages:
            own["first_jobs"] = tuple(ShardJob(one, "") for one in NAMES)
        above = tuple(stages[-1:])
        stages.append(
            ShardStage(
                name,
                {},
                Folder(str(root / name)),
                above,
                worker=Number,
                arguments=arguments.get(name, {}),
                **own,
            )
        )
    return stages


def carry_out(stages: list[ShardStage], root: Path, pool: ActorPool, overlap: bool = True) -> list[str]:
    said: list[str] = []
    run(stages, root, RayConfig(num_cpus=2), said.append, pool, overlap=overlap)
    return said


def test_a_shard_goes_on_while_others_are_made(pool: ActorPool, tmp_path: Path):
    """The last shard of `first` waits for the first of `third`, and the stages have two actors between them:
    stage by stage that would wait for ever.
    """
    stages = chain(tmp_path, {"first": {"after": {NAMES[-1]: tmp_path / "third" / f"{NAMES[0]}.json"}}})
    carry_out(stages, tmp_path, pool)
    assert {state.status for state in states(stages).values()} == {"fresh"}


def test_a_file_of_a_whole_stage_is_waited_for(pool: ActorPool, tmp_path: Path):
    """`third` reads a sum of `second`, which is of all of its shards."""

    def sum_up(folder: Folder, shards: ShardTable) -> list[str]:
        folder.write("sum", str(sum(int(folder.read(file)) for file in shards.column("file"))).encode())
        return ["sum"]

    def build(root: Path) -> list[ShardStage]:
        return chain(root, second={"finish": sum_up}, third={"stage_files": (("second", "sum"),)})

    carry_out(build(tmp_path / "one"), tmp_path / "one", pool)
    carry_out(build(tmp_path / "two"), tmp_path / "two", pool, overlap=False)
    assert (tmp_path / "one/second/sum").read_text() == "15"
    inputs = [
        read_sidecar(Folder(str(tmp_path / root / "third")), NAMES[3]).inputs for root in ("one", "two")
    ]
    assert inputs[0] == inputs[1] and inputs[0].keys() == {"second", "second/sum"}
    last = (tmp_path / "one/second" / f"{NAMES[-1]}.json").stat().st_mtime_ns
    assert all((tmp_path / "one/third" / f"{name}.json").stat().st_mtime_ns > last for name in NAMES)


def test_shards_that_fail_fail_their_stage_when_all_others_are_done(pool: ActorPool, tmp_path: Path):
    stages = chain(tmp_path, {"second": {"fails": frozenset(NAMES[1:2])}})
    with pytest.raises(StageError, match=r"stage second: 1 of 6 shards failed(.|\n)*00001 .* is not to be"):
        carry_out(stages, tmp_path, pool)
    there = {stage.name: {path.stem for path in stage.folder.path.glob("0*.json")} for stage in stages}
    others = {*NAMES} - {NAMES[1]}
    assert there == {"first": {*NAMES}, "second": others, "third": others}
    found = states(stages)
    assert [found[stage.name].status for stage in stages] == ["fresh", "partial", "stale"]
    mended = chain(tmp_path)
    carry_out(mended, tmp_path, pool)
    assert {state.status for state in states(mended).values()} == {"fresh"}
