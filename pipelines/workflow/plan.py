"""A workflow's shards, samples, bytes and device time before it runs: from what is complete, and from a probe
of the rest.

The probe sends a few samples, spread evenly over the source, through the very workers of the stages, in this
process and into a folder that is thrown away. A tar's size follows exactly from the bytes of its samples; of
other files, two probe shards of different size tell the fixed part from the part that grows.
"""

import dataclasses
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.dag import ShardStage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.manifest import ShardTable, StageOutput
from pipelines.shards.store import Sidecar
from pipelines.shards.tars import END_BYTES, RECORD_BYTES
from pipelines.sources.base import Entries
from pipelines.workflow.inspection import State, states
from pipelines.workflow.run import complete
from repfusion.display.tables import aligned
from repfusion.tars import BLOCK_BYTES, StreamSource, TarReader

NUM_PROBE_SAMPLES = 128
PROBE_SHARDS = {"00000": 1.0, "00001": 0.25}
"""The probe's shards and their share of its samples."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will hold, and what is left to do for it."""

    name: str
    status: str
    num_shards: int
    num_todo: int
    samples: int
    bytes: int
    bytes_todo: int
    seconds_todo: float
    """Seconds of one actor, whatever their number."""
    actors: ActorsConfig

    @property
    def device(self) -> str:
        return "GPU" if self.actors.num_gpus else "CPU"


@dataclass(frozen=True)
class Rates:
    """What the probe says of a stage, per sample it is given."""

    kept: float
    """Share of the samples that stay."""
    tar_bytes: float
    """Bytes of a tar's members, per sample in it."""
    other_bytes: float
    """Bytes of other files, per sample given."""
    fixed_bytes: float
    """Bytes of other files, per shard."""
    whole_bytes: int
    """Bytes of files of the stage as a whole."""
    has_tar: bool
    seconds: float
    """Seconds of one actor, per sample given."""

    def shard_bytes(self, given: float) -> float:
        """Expected size of all files of a shard that is given so many samples."""
        other = self.fixed_bytes + self.other_bytes * given
        if not self.has_tar:
            return other
        content = self.tar_bytes * self.kept * given + END_BYTES
        return other + math.ceil(content / RECORD_BYTES) * RECORD_BYTES


def tar_content_bytes(data: bytes) -> int:
    """Bytes of a tar without its end mark and padding."""
    members = TarReader(StreamSource(io.BytesIO(data)))
    return max((one.offset + one.size + -one.size % BLOCK_BYTES for one in members), default=0)


def probe(stages: Sequence[ShardStage], entries: Entries, num_samples: int) -> dict[str, Rates]:
    """Runs the workers on about `num_samples` entries. `stages` write into a folder of the caller's choice.

    Raises:
        ValueError: where a stage keeps none of its samples.
        Whatever a worker raises: a configuration that fails on the probe fails on all of it.
    """
    from transformers.utils.logging import disable_progress_bar

    # the table is what people wait for, not how models load
    disable_progress_bar()
    rates: dict[str, Rates] = {}
    outputs: dict[str, StageOutput] = {}
    for stage in stages:
        if not stage.upstream:
            stage = dataclasses.replace(stage, first_jobs=tuple(_probe_jobs(entries, num_samples)))
        shards = ShardTable.of(_work(stage, outputs))
        files = stage.finish(stage.folder, shards)
        outputs[stage.name] = output = complete(stage, shards, files, outputs, seconds=0.0)
        if stage.upstream:
            given = outputs[stage.upstream[0].name].shards.column("samples")
        else:
            given = [shard.entries for shard in shards]
        whole_bytes = sum(file.bytes for file in output.manifest.files.values())
        rates[stage.name] = _rates(stage, list(shards), given, whole_bytes)
    return rates


def _probe_jobs(entries: Entries, num_samples: int) -> Iterator[ShardJob]:
    for index, (name, share) in enumerate(PROBE_SHARDS.items()):
        wanted = max(1, round(num_samples * share))
        for part, job in enumerate(entries.probe(wanted, index)):
            yield dataclasses.replace(job, name=f"{name}{part or ''}")


def _work(stage: ShardStage, outputs: Mapping[str, StageOutput]) -> Iterator[Sidecar]:
    """Makes a stage's probe shards, in this process."""
    jobs = stage.jobs(outputs, set(stage.shard_names(outputs)), {})
    with stage.surround() as more:
        worker = stage.worker(folder=stage.folder, **stage.arguments, **more)
        for index, job in enumerate(jobs):
            if index == 0 and not stage.reaches_out:
                # the first batch of a model also pays for its set-up
                worker(job)
            yield worker(job)


def _rates(stage: ShardStage, sidecars: Sequence[Sidecar], given: Sequence[int], whole_bytes: int) -> Rates:
    num_given = max(1, sum(given))
    num_kept = sum(sidecar.samples for sidecar in sidecars)
    if not num_kept:
        drops = ShardTable.of(sidecars).drops
        reasons = ", ".join(f"{reason} {number}" for reason, number in drops.items())
        raise ValueError(
            f"stage {stage.name}: of the probe's {sum(given)} samples none is left "
            f"({reasons or 'there were none'}), so there is nothing to plan by; correct the cause, or raise "
            "--probe"
        )
    has_tar = sidecars[0].file.endswith(".tar")
    content = 0
    points: list[tuple[int, int]] = []
    for sidecar, number in zip(sidecars, given, strict=True):
        other = sum(file.bytes for file in sidecar.files.values())
        if has_tar:
            content += tar_content_bytes(stage.folder.read(sidecar.file))
        else:
            other += sidecar.bytes
        points.append((number, other))
    slope, fixed = _line(points)
    return Rates(
        kept=num_kept / num_given,
        tar_bytes=content / num_kept,
        other_bytes=slope,
        fixed_bytes=fixed,
        whole_bytes=whole_bytes,
        has_tar=has_tar,
        seconds=sum(sidecar.seconds for sidecar in sidecars) / num_given,
    )


def _line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(slope, value at 0) of the straight line through the smallest and the largest point; neither is
    negative.
    """
    (low, low_bytes), (high, high_bytes) = min(points), max(points)
    slope = max(0.0, (high_bytes - low_bytes) / (high - low)) if high > low else 0.0
    return slope, max(0.0, low_bytes - slope * low)


def plan(
    stages: Sequence[ShardStage],
    entries: Callable[[], Entries],
    probe_stages: Callable[[Path], Sequence[ShardStage]],
    num_samples: int = NUM_PROBE_SAMPLES,
    samples_per_sec: Mapping[str, float] = {},
) -> list[StagePlan]:
    """What every data stage will hold. `samples_per_sec` of one actor, by stage, takes the place of the
    probe's time.

    A stage that is complete is not probed; one that is partial is judged by its complete shards' sizes and by
    the probe.

    Args:
        stages: the workflow's.
        entries: of its source; asked for only if something has to be probed.
        probe_stages: the same stages with their folders under the given path.
    """
    found = states(stages)
    rates: dict[str, Rates] = {}
    source: Entries | None = None
    if any(state.status != "fresh" for state in found.values()):
        source = entries()
        with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
            rates = probe(probe_stages(Path(scratch)), source, num_samples)
    plans: list[StagePlan] = []
    num_shards, samples = 0, 0.0
    for stage in stages:
        state = found[stage.name]
        if state.output is not None:
            manifest = state.output.manifest
            num_shards, samples = manifest.num_shards, manifest.samples
            plans.append(
                StagePlan(
                    stage.name, "fresh", num_shards, 0, manifest.samples, manifest.bytes, 0, 0.0, stage.actors
                )
            )
            continue
        assert source is not None
        if not stage.upstream:
            num_shards, samples = len(source.shard_names), float(source.num_entries)
        plans.append(_plan_stage(stage, state, rates[stage.name], num_shards, samples, samples_per_sec))
        samples *= rates[stage.name].kept
    return plans


def _plan_stage(
    stage: ShardStage,
    state: State,
    rate: Rates,
    num_shards: int,
    given: float,
    samples_per_sec: Mapping[str, float],
) -> StagePlan:
    per_shard = given / max(1, num_shards)
    kept_bytes = ShardTable.of(state.kept).bytes
    num_todo = num_shards - len(state.kept)
    bytes_todo = round(num_todo * rate.shard_bytes(per_shard)) + rate.whole_bytes
    seconds = 1 / samples_per_sec[stage.name] if stage.name in samples_per_sec else rate.seconds
    return StagePlan(
        stage.name,
        state.status,
        num_shards,
        num_todo,
        round(given * rate.kept),
        kept_bytes + bytes_todo,
        bytes_todo,
        num_todo * per_shard * seconds,
        stage.actors,
    )


def table(plans: Sequence[StagePlan]) -> str:
    """The plan for people: a line a stage and the total."""
    head = ("stage", "status", "shards", "to do", "samples", "size", "to write", "actor time", "device")
    rows = [
        (
            one.name,
            one.status,
            f"{one.num_shards:,}",
            f"{one.num_todo:,}",
            f"{one.samples:,}",
            size(one.bytes),
            size(one.bytes_todo),
            duration(one.seconds_todo),
            one.device,
        )
        for one in plans
    ]
    sums = ((one.bytes, one.bytes_todo, one.seconds_todo) for one in plans)
    total = [sum(column) for column in zip(*sums, strict=True)]
    rows.append(("total", "", "", "", "", size(total[0]), size(total[1]), duration(total[2]), ""))
    return aligned([head, *rows], left=(0, 1, len(head) - 1))


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
