"""Raw shards and what `judge` says of them -> the shards that training uses; each sample left out has a
counted reason.
"""

from typing import Any

from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.duplicates.find import DUPLICATES, DuplicateList, Duplicates, read_verdicts
from pipelines.limits import Limits, MostTokens, limit_fields
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from repfusion.config import Config
from repfusion.video.looks import ClipRules


class CurateConfig(Config):
    """Which samples stay: the stages `judge` and `curate`. Rules of size, aspect and caption are for the
    target of an editing sample and its instruction; its sources have to be there and readable.
    """

    min_side_px: int = Field(default=16, ge=1)
    """Shortest side an image may have, before ingest resized it where that is known."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Width times height of the stored image; one above it is not decoded."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer over shorter side, before ingest resized it where that is known; None takes any."""
    min_caption_chars: int = Field(default=1, ge=0)
    """Shortest caption, surrounding space not counted."""
    max_caption_chars: int = Field(default=1000, ge=1)
    """Longest caption, in characters."""
    max_caption_tokens: MostTokens = "context"
    """Longest caption, in tokens of the language models that read it: those of the trainings that draw the
    main caption and of the columns of prompt features. `context` is what fits into their contexts, a number
    may be less; None counts none, and a training then refuses to start where one does not fit. Another
    tokenizer, or a method that leaves less room, makes `judge` and what follows stale.
    """
    duplicates: Duplicates = "exact"
    """Which images count as the same, so that the first alone stays: `exact` compares the stored bytes,
    `near` also the perceptual hash, which sees brightness and coarse layout and no colour, of a clip in four
    of its frames. Captions
    are not compared: a list with several captions to an image needs `keep`. Editing samples are: they are
    duplicates where sources and instruction are the same, to the byte, and the targets count as the same.
    """
    clips: ClipRules = ClipRules()
    """What a clip has to show; not read where samples are images."""
    near_duplicate_bits: int = Field(default=4, ge=0, le=8)
    """Bits, of 64, in which the hashes of two images may differ that `near` takes for the same."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """A shard that loses more than this fails instead, duplicates counted. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """The pool of each of the two. Changes no bytes."""


def judge_fields(config: CurateConfig, limits: Limits, are_clips: bool = False) -> dict[str, Any]:
    """What decides the bytes of `judge`; `limits` are those of the captions."""
    fields = config.model_dump(
        mode="json", exclude={"clips", "near_duplicate_bits", "max_drop_fraction", "actors"}
    )
    if are_clips:
        fields["clips"] = config.clips.model_dump(mode="json")
    if config.duplicates == "near":
        fields["near_duplicate_bits"] = config.near_duplicate_bits
    if limits:
        fields["caption_limits"] = limit_fields(limits)
    return {f"curate.{name}": value for name, value in fields.items()}


def curate_fields(config: CurateConfig) -> dict[str, Any]:
    """What decides the bytes of `curate` beyond those of `ingest` and `judge`: nothing."""
    return {}


class CurateWorker:
    """Copies the samples of `NAME.tar` that stay, byte for byte, and lists the others in
    `NAME.drops.parquet`.

    Args:
        folder: of the stage.
        source: of `ingest`.
        judged: of `judge`, complete.
        config: of the two stages.
    """

    def __init__(self, folder: Folder, source: Folder, judged: Folder, config: CurateConfig):
        self.folder, self.source, self.judged, self.config = folder, source, judged, config
        self._duplicates = DuplicateList(judged)

    def __call__(self, job: ShardJob) -> Sidecar:
        rows = read_verdicts(
            self.judged, job.name, read_sidecar(self.judged, job.name), ["key", "reason", "detail"]
        )
        duplicates = self._duplicates.of(rows["key"])
        verdicts = iter(rows.to_pylist())
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs) as commit:
            with tar_shard(commit) as samples:
                file = f"{job.name}.tar"
                for key, members in read_samples(self.source, file, read_sidecar(self.source, job.name)):
                    self._check_same(job.name, key, (row := next(verdicts, None)) and row["key"])
                    assert row is not None
                    if row["reason"] is not None:
                        commit.drop(key, row["reason"], row["detail"])
                    elif (found := duplicates.get(key)) is not None:
                        commit.drop(key, found[0], f"duplicate of {found[1]}")
                    else:
                        samples.write(key, members)
                if (row := next(verdicts, None)) is not None:
                    self._check_same(job.name, None, row["key"])
            commit.check_drops(self.config.max_drop_fraction)
            commit.write_drops()
            return commit.commit(file)

    def _check_same(self, name: str, stored: str | None, judged: str | None) -> None:
        if stored != judged:
            raise ShardError(
                f"shard {name}: {self.source} holds {stored or 'no more samples'} where {self.judged} judged "
                f"{judged or 'no more samples'}; re-run the stage '{self.judged.name}'"
            )


def curate_stage(config: CurateConfig, raw: Stage, judged: Stage, place: Place) -> ShardStage:
    """The stage `curate` of what `ingest` (`raw`) holds and `judge` says of it."""
    return ShardStage(
        "curate",
        curate_fields(config),
        place.data / "curate",
        (raw, judged),
        CurateWorker,
        {"source": raw.folder, "judged": judged.folder, "config": config},
        config.actors,
        stage_files=((judged.name, DUPLICATES),),
    )
