"""Clips through the stages: from seeds, tars and folders to shards, verdicts, what stays, and features."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_video import tiny_video_vae

from pipelines.config import WorkflowConfig
from pipelines.duplicates.find import find_duplicates
from pipelines.reporting.browse import Library, Shelf
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.manifest import ShardTable
from pipelines.shards.parquet import read_parquet
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.sources.build import source_of
from pipelines.sources.folder import FolderConfig, FolderWorker
from pipelines.sources.folder import jobs as folder_jobs
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.moving import ClipDefectsConfig, MovingScenesConfig, MovingScenesWorker, jobs
from pipelines.sources.raw_samples import CLIP_ENDINGS
from pipelines.sources.tars import TarsConfig, TarWorker
from pipelines.sources.tars import jobs as tar_jobs
from pipelines.stages.curate import CurateConfig, CurateWorker, judge_fields
from pipelines.stages.image_features import (
    ImageFeaturesWorker,
    VideoFeaturesConfig,
    merge_statistics,
    video_fingerprint_fields,
)
from pipelines.stages.judge import JudgeWorker
from repfusion.data.dataset import ColumnDataset
from repfusion.data.readers import SampleArray
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.video_vae import VideoEncoderConfig
from repfusion.scenes.moving.clips import draw_clip, moving_scene_of, render_clip
from repfusion.scenes.moving.edits import CLIP_EDIT_KINDS
from repfusion.video.files import encode_clip
from repfusion.video.fitting import read_clip
from repfusion.video.forms import ClipForm

INGEST = IngestConfig(image_size=64, clips=ClipForm(), max_drop_fraction=1)
DEFECTS = ClipDefectsConfig(
    missing=1, undecodable=1, too_short=2, black=1, still=1, repeated=2, empty_caption=1
)
LOST = {"no_image": 1, "undecodable_clip": 1, "clip_too_short": 2}
JUDGED = {"black_clip": 1, "still_clip": 1, "exact_duplicate": 2, "empty_caption": 1}


def drawn(to: Path, config: MovingScenesConfig) -> list[Sidecar]:
    worker = MovingScenesWorker(Folder.at(to), config, INGEST)
    return [worker(job) for job in jobs(config)]


def read(to: Path, sidecars: list[Sidecar]) -> dict[str, dict[str, bytes]]:
    return {key: members for one in sidecars for key, members in read_samples(Folder.at(to), one.file, one)}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> tuple[Path, list[Sidecar]]:
    root = tmp_path_factory.mktemp("clips") / "ingest"
    return root, drawn(root, MovingScenesConfig(num_samples=22, shard_size=12, defects=DEFECTS))


def test_each_seed_ends_as_a_clip_that_shows_its_facts_or_as_a_counted_drop(ingested):
    root, sidecars = ingested
    drops = sum((Counter(one.drops) for one in sidecars), Counter())
    assert drops == LOST and sum(one.samples for one in sidecars) == 22 - 4
    assert all("av" in one.versions for one in sidecars)
    found = read(root, sidecars)
    spoilt = 0
    for members in found.values():
        assert members.keys() == {"mp4", "txt", "json"}
        said, clip = json.loads(members["json"]), read_clip(members["mp4"])
        assert said["clip"] == {"num_frames": 9, "rate": 8, "original_sec": 1.125, "original_rate": 8}
        assert (said["width"], said["height"], clip.rate) == (64, 64, pytest.approx(8))
        spoilt += not np.array_equal(clip.frames, render_clip(moving_scene_of(said["moving_scene"])))
    assert spoilt == 2  # the black and the still one


def test_the_same_bytes_whatever_the_shards(tmp_path):
    config = MovingScenesConfig(num_samples=4, shard_size=4)
    one, two = drawn(tmp_path / "one", config), drawn(tmp_path / "two", config)
    assert one[0].sha256 == two[0].sha256
    halved = config.model_copy(update={"shard_size": 2})
    assert read(tmp_path / "three", drawn(tmp_path / "three", halved)) == read(tmp_path / "one", one)


def test_edits_of_clips_have_a_source_clip(tmp_path):
    config = MovingScenesConfig(num_samples=8, edits=True, defects=ClipDefectsConfig(still=1))
    (sidecar,) = drawn(tmp_path, config)
    found = read(tmp_path, [sidecar])
    assert all(members.keys() == {"mp4", "source.mp4", "txt", "json"} for members in found.values())
    kinds = {json.loads(members["json"])["clip_edit"]["kind"] for members in found.values()}
    assert kinds <= set(CLIP_EDIT_KINDS) and len(kinds) > 2
    verdicts = judged(tmp_path, [sidecar], tmp_path / "judge")
    assert Counter(row["reason"] for row in verdicts) == {None: 7, "still_clip": 1}


def judged(ingest: Path, sidecars: list[Sidecar], to: Path, **settings) -> list[dict]:
    config = CurateConfig(max_drop_fraction=1, **settings)
    worker = JudgeWorker(Folder.at(to), Folder.at(ingest), config, are_clips=True)
    made = [worker(ShardJob(one.name, "f", {})) for one in sidecars]
    return [row for one in made for row in read_parquet(Folder.at(to), one.file).to_pylist()]


def curated(ingest: Path, sidecars: list[Sidecar], root: Path, **settings) -> list[Sidecar]:
    config = CurateConfig(max_drop_fraction=1, **settings)
    worker = JudgeWorker(Folder.at(root / "judge"), Folder.at(ingest), config, are_clips=True)
    table = ShardTable.of([worker(ShardJob(one.name, "f", {})) for one in sidecars])
    find_duplicates(Folder.at(root / "judge"), table, config.duplicates, config.near_duplicate_bits)
    folders = [Folder.at(path) for path in (root / "curate", ingest, root / "judge")]
    worker = CurateWorker(*folders, config)
    return [worker(ShardJob(one.name, "f", {})) for one in sidecars]


def test_what_does_not_decode_or_shows_nothing_is_named_and_left_out(ingested, tmp_path):
    ingest, sidecars = ingested
    verdicts = judged(ingest, sidecars, tmp_path / "judge")
    reasons = Counter(row["reason"] for row in verdicts if row["reason"])
    assert reasons == {name: JUDGED[name] for name in ("black_clip", "still_clip", "empty_caption")}
    assert all(row["width"] == row["height"] == 64 for row in verdicts if row["width"])
    kept = curated(ingest, sidecars, tmp_path)
    assert sum((Counter(one.drops) for one in kept), Counter()) == JUDGED
    data = ColumnDataset(tmp_path / "curate", {}, {}, reads_images=True)
    assert len(data) == 22 - 4 - 5
    frames = data[3].target()
    assert frames is not None and frames.shape == (9, 64, 64, 3)


@pytest.mark.slow
def test_clips_become_a_column_that_the_loader_reads_and_statistics(ingested, tmp_path):
    ingest, sidecars = ingested
    kept, images = curated(ingest, sidecars, tmp_path), Folder.at(tmp_path / "curate")
    encoder = VideoEncoderConfig(path=tiny_video_vae(tmp_path / "vae"), image_size=64, num_frames=9)
    config = VideoFeaturesConfig(encoder=encoder, batch_size=4, actors=ActorsConfig(num_actors=1, num_cpus=1))
    folder = Folder.at(tmp_path / "video_features")
    worker = ImageFeaturesWorker(folder, images, config, encoder)
    for one in kept:
        assert worker(ShardJob(one.name, "f", {})).samples == one.samples
    merge_statistics(folder, [one.name for one in kept], "statistics.safetensors")
    reader, columns = {"video_features": SampleArray()}, {"video_features": folder.path}
    data = ColumnDataset(images.path, columns, reader, reads_images=True)
    features = np.stack([data[index].read("video_features") for index in range(len(data))])
    assert features.shape == (22 - 4 - 5, 3 * 8 * 8, 4) and features.dtype == np.float16
    clip = torch.from_numpy(data[3].target())[None]
    own = encoder.load().encode_images(clip).features[0]
    np.testing.assert_allclose(features[3], own.half().numpy(), atol=2e-3)
    statistics = LatentStatistics.load(folder.path / "statistics.safetensors")
    np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(0), atol=1e-6)
    small = encoder.model_copy(update={"image_size": 32, "num_frames": 5})
    other = ImageFeaturesWorker(Folder.at(tmp_path / "other"), images, config, small)
    with pytest.raises(ShardError, match=r"9 frames of 64 x 64 px.*ingest.image_size=32"):
        other(ShardJob(kept[0].name, "f", {}))


def test_near_duplicates_are_known_by_four_frames_and_motions_tell_clips_apart(ingested, tmp_path):
    ingest, sidecars = ingested
    rows = judged(ingest, sidecars, tmp_path / "judge", duplicates="near")
    hashes = Counter(row["hash"] for row in rows if row["hash"] is not None)
    assert max(hashes.values()) == 3 and sum(number > 1 for number in hashes.values()) == 1


def others(root: Path) -> dict[str, bytes]:
    """Files as others have them: of three kinds, and what is no clip of the wanted form."""
    frames = render_clip(draw_clip(1, kinds=("move",)))
    stream = io.BytesIO()
    first, *more = (Image.fromarray(frame) for frame in frames)
    first.save(stream, "GIF", save_all=True, append_images=more, duration=120, disposal=2)
    return {
        "a.mp4": encode_clip(frames, 8.0),
        "b.gif": stream.getvalue(),
        "c.mov": encode_clip(np.repeat(frames, 3, axis=0), 24.0),
        "d.mp4": b"no clip",
        "e.mp4": encode_clip(frames[:3], 8.0),
        "f.mp4": encode_clip(frames, 2.0),
        "g.mp4": encode_clip(frames, 8.0)[:1200],
    }


EXPECTED = {"undecodable_clip": 2, "clip_too_short": 1, "rate_too_low": 1}


def test_folders_of_clips_end_as_samples_or_counted_drops(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, data in others(tmp_path).items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"a caption of {name}")
    (folder / "x.png").write_bytes(b"no clip by its name")
    config = FolderConfig(path=str(folder))
    assert source_of(config, INGEST).entries().num_entries == 7
    worker = FolderWorker(Folder.at(tmp_path / "ingest"), config, INGEST)
    (sidecar,) = [worker(job) for job in folder_jobs(config, CLIP_ENDINGS)]
    assert sidecar.drops == EXPECTED and sidecar.samples == 3
    found = read(tmp_path / "ingest", [sidecar])
    frames = [read_clip(members["mp4"]).frames for members in found.values()]
    assert np.array_equal(frames[0], frames[2]) and len(frames) == 3
    said = [json.loads(members["json"]) for members in found.values()]
    assert [one["source_file"] for one in said] == ["a.mp4", "b.gif", "c.mov"]
    assert said[2]["clip"]["original_rate"] == 24


def test_tars_of_clips_end_as_samples_or_counted_drops(tmp_path):
    with (
        ShardCommit(Folder.at(tmp_path / "foreign"), "00000", "f", {}) as commit,
        tar_shard(commit) as samples,
    ):
        for name, data in others(tmp_path).items():
            key, _, extension = name.partition(".")
            samples.write(key, {extension: data, "txt": b"a caption"})
        samples.write("h", {"mp4": others(tmp_path)["a.mp4"], "source.mp4": b"none", "txt": b"do it"})
        commit.commit("00000.tar")
    config = TarsConfig(path=str(tmp_path / "foreign" / "00000.tar"), images=("source",))
    worker = TarWorker(Folder.at(tmp_path / "ingest"), config, INGEST)
    (sidecar,) = [worker(job) for job in tar_jobs(config)]
    assert sidecar.drops == {"missing_source": 3, **EXPECTED, "broken_source": 1}
    plain = TarWorker(Folder.at(tmp_path / "plain"), config.model_copy(update={"images": ()}), INGEST)
    (sidecar,) = [plain(job) for job in tar_jobs(config)]
    assert sidecar.drops == {**EXPECTED, "extra_image": 1} and sidecar.samples == 4


def test_a_browser_gets_an_animation_and_its_frames(ingested):
    root, sidecars = ingested
    library = Library("clips", {"ingest": Shelf(Folder.at(root), None)})
    key = next(iter(read(root, sidecars)))
    page = library.answer("/ingest/00000").body.decode()
    assert f'href="/ingest/00000/{key}/sheet"' in page
    shown = library.answer(f"/ingest/00000/{key}")
    assert shown.kind == "image/webp" and Image.open(io.BytesIO(shown.body)).is_animated
    sheet = library.answer(f"/ingest/00000/{key}/sheet")
    assert Image.open(io.BytesIO(sheet.body)).size == (6 * 66 - 2, 2 * 66 - 2)
    assert library.answer("/ingest/00000/nothing/sheet").status == 404


def workflow(tmp_path: Path, **sections) -> WorkflowConfig:
    return WorkflowConfig.model_validate({"root": tmp_path / "run", **sections})


def test_a_workflow_of_clips_says_what_does_not_go_together(tmp_path):
    encoder = {"path": str(tmp_path), "image_size": 64, "num_frames": 9}
    columns = {"video_features": {"encoder": encoder}}
    clips = {"ingest": {"clips": {}}, "source": {"kind": "moving_scenes"}}
    config = workflow(tmp_path, **clips, columns=columns, last_stage="video_features")
    assert config.stage_names[:5] == ["source", "ingest", "judge", "curate", "video_features"]
    assert workflow(tmp_path, **clips, last_stage="curate").made_columns == []
    for wrong, message in {
        "give ingest.clips": {"source": {"kind": "moving_scenes"}},
        "is of clips": {"columns": columns},
        "has images alone": {"ingest": {"clips": {}}, "last_stage": "curate"},
        "is not of clips .* such as last_stage=video_features": {**clips, "columns": columns},
        "of images, ingest.clips": {**clips, "columns": {"image_features": {"encoder": {}}}},
        "center_crop alone": {"ingest": {"clips": {}, "resize": "border"}},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            workflow(tmp_path, **message)


def test_rules_of_clips_decide_bytes_where_there_are_clips_alone():
    rules = CurateConfig(clips={"still_share": None})
    assert judge_fields(rules, {}) == judge_fields(CurateConfig(), {})
    assert judge_fields(rules, {}, True) != judge_fields(CurateConfig(), {}, True)
    encoder = VideoEncoderConfig(path=Path("vae"), image_size=64, num_frames=9)
    fields = video_fingerprint_fields("v", "digest", VideoFeaturesConfig(encoder=encoder))
    assert fields == {
        "columns.v.encoder.path": "digest",
        "columns.v.encoder.image_size": 64,
        "columns.v.encoder.num_frames": 9,
        "columns.v.dtype": "float16",
    }
