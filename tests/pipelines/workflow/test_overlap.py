"""`overlap: true` of whole workflows: the files of stage by stage, whatever was there before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import data_files, found, ran, run_all, statuses

from pipelines.config import WorkflowConfig
from pipelines.runtime.pool import ActorPool

pytestmark = pytest.mark.ray
Configure = Callable[..., WorkflowConfig]


def test_the_bytes_are_those_of_stage_by_stage(
    configure: Configure, complete_run: WorkflowConfig, pool: ActorPool, tmp_path: Path
):
    config = configure(tmp_path / "run", overlap=True)
    results, said = run_all(config, pool)
    assert data_files(config.data_folder) == data_files(complete_run.data_folder)
    for name, state in found(complete_run).items():
        assert results[name].manifest.digest == state.output.manifest.digest
        assert results[name].manifest.shards_digest == state.output.manifest.shards_digest
    assert [line.partition(":")[0] for line in said] == list(results)
    results, _ = run_all(config, pool)
    assert ran(results) == []


@pytest.mark.slow
def test_only_what_is_missing_is_made(
    configure: Configure, complete_run: WorkflowConfig, pool: ActorPool, tmp_path: Path
):
    """One shard of `judge` is gone, one of another's bytes lies in `curate`, a column lacks its manifest."""
    shutil.copytree(complete_run.root, tmp_path / "run")
    config = configure(tmp_path / "run", overlap=True)
    folder = config.data_folder
    (folder / "judge").remove("00001.parquet")
    (folder / "curate").write("00002.tar", b"other")
    (folder / "prompt_features").remove("manifest.json")
    before = {path: path.stat().st_mtime_ns for path in config.root.rglob("*.*")}
    results, _ = run_all(config, pool)
    assert data_files(folder) == data_files(complete_run.data_folder)
    assert ran(results) == ["judge", "curate", "prompt_features"]
    made = {
        str(path.relative_to(config.root))
        for path in config.root.glob("*/0*.*")
        if path.stat().st_mtime_ns != before.get(path)
    }
    assert {name.partition(".")[0] for name in made} == {"judge/00001", "curate/00002"}
    assert set(statuses(config).values()) == {"fresh"}


@pytest.mark.slow
def test_without_duplicates_to_find_encoding_does_not_wait_for_the_last_download(
    configure: Configure, pool: ActorPool, tmp_path: Path
):
    """`curate.duplicates: keep`: `duplicates.parquet` is there before any verdict; the bytes are the same."""
    sections = {"curate": {"duplicates": "keep"}, "last_stage": "image_features"}
    flowing, plain = (configure(tmp_path / name, overlap=name == "a", **sections) for name in ("a", "b"))
    run_all(flowing, pool)
    run_all(plain, pool)
    assert data_files(flowing.data_folder) == data_files(plain.data_folder)
    judged = flowing.root / "judge"
    last = max(path.stat().st_mtime_ns for path in judged.glob("0*.json"))
    assert min(path.stat().st_mtime_ns for path in (flowing.root / "curate").glob("0*.json")) < last
    assert set(statuses(flowing).values()) == {"fresh"}
