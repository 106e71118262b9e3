"""Every kind of damage is named, moved aside and made good, byte for byte; what is sound is not touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from running import data_files, file_times, run_all, shard_times, statuses

from pipelines.build import data_stages
from pipelines.commands import verify_data
from pipelines.shards.manifest import ShardTable
from pipelines.workflow.verify import QUARANTINE, verify
from repfusion.config import to_yaml

pytestmark = pytest.mark.ray


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 if position is None else position] ^= 1
    path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    """Exchanges two shards of one size and name, as a careless copy may."""
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def test_a_sound_workflow_has_nothing_broken(complete_run, pool):
    before, said = shard_times(complete_run.root), []
    assert (
        verify(data_stages(complete_run), complete_run.root, complete_run.ray, True, said.append, pool) == []
    )
    assert "image_features: 4 shards read, 0 broken" in said
    assert shard_times(complete_run.root) == before


def test_each_broken_shard_is_named_and_it_alone_made_anew(run_copy, pool):
    root = run_copy.root
    expected, before = data_files(run_copy.data_folder), shard_times(root)
    flip(root / "source" / "00001.images.tar")
    flip(root / "ingest" / "00002.tar")
    flip(root / "judge" / "00000.parquet")
    flip(root / "judge" / "duplicates.parquet")
    flip(root / "curate" / "00003.tar", -1)  # in the padding behind the end mark
    flip(root / "image_features" / "statistics.safetensors", -1)
    flip(root / "image_features" / "00002.statistics.safetensors", -1)
    flip(root / "image_features" / "00000.tar")
    swap(root / "prompt_features" / "00000.json", root / "prompt_features" / "00001.json")
    said: list[str] = []
    broken = verify(data_stages(run_copy), root, run_copy.ray, True, said.append, pool)
    changed = "its bytes changed since it was written"
    assert {
        (f"{one.stage}/{one.name}", one.problem.partition(": ")[2].partition(" (")[0]) for one in broken
    } == {
        ("source/00001", changed),
        ("ingest/00002", changed),
        ("judge/00000", changed),
        ("judge/duplicates.parquet", changed),
        ("curate/00003", changed),
        ("image_features/statistics.safetensors", changed),
        ("image_features/00002", changed),
        ("image_features/00000", changed),
        ("prompt_features/00000", ""),
        ("prompt_features/00001", ""),
    }
    for one in broken:
        assert f"  {one.stage}/{one.name}: {one.problem}" in said
    aside = {path.name for path in (root / "ingest" / QUARANTINE).iterdir()}
    assert aside >= {"00002.json", "00002.tar"} and all(name.startswith("00002.") for name in aside)
    assert data_files(run_copy.data_folder) == expected
    after = shard_times(root)
    again = {name.partition(".")[0] for name in after if after[name] != before[name]}
    whole = {"judge/duplicates", "image_features/statistics"}
    assert again == {f"{one.stage}/{one.name}".partition(".")[0] for one in broken} | whole
    assert sum("as before, digest" in line for line in said) == 6
    assert set(statuses(run_copy).values()) == {"fresh"}
    assert verify(data_stages(run_copy), root, run_copy.ray, True, said.append, pool) == []


def test_what_a_listing_shows_is_left_to_the_next_run(run_copy, pool):
    """A file that is gone or of another size makes the stage partial: `status` says so without reading."""
    root = run_copy.root
    expected = data_files(run_copy.data_folder)
    (root / "curate" / "00001.json").unlink()
    tar = root / "image_features" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    flip(root / "curate" / "00002.tar")
    said: list[str] = []
    broken = verify(data_stages(run_copy), root, run_copy.ray, True, said.append, pool)
    assert [f"{one.stage}/{one.name}" for one in broken] == ["curate/00002"]
    assert statuses(run_copy)["curate"] == "partial"
    run_all(run_copy, pool)
    assert data_files(run_copy.data_folder) == expected


def test_a_table_of_shards_that_says_something_else_is_written_again(run_copy, pool):
    folder = run_copy.data_folder / "image_features"
    expected = data_files(run_copy.data_folder)
    before = shard_times(run_copy.root)
    shards = list(ShardTable.read(folder))
    ShardTable.of([shards[0].model_copy(update={"sha256": "0" * 64}), *shards[1:]]).write(folder)
    said: list[str] = []
    broken = verify(data_stages(run_copy), run_copy.root, run_copy.ray, True, said.append, pool)
    assert [(one.stage, one.name) for one in broken] == [("image_features", "shards.parquet")]
    assert data_files(run_copy.data_folder) == expected
    after = shard_times(run_copy.root)
    assert [name for name in after if after[name] != before[name]] == [
        "image_features/statistics.safetensors"
    ]


def test_reporting_touches_nothing(run_copy, pool):
    path = run_copy.root / "prompt_features" / "00002.tar"
    flip(path)
    before = file_times(run_copy.root)
    assert verify_data(run_copy, repair=False) == 1
    assert file_times(run_copy.root) == before
    assert statuses(run_copy)["prompt_features"] == "fresh"


@pytest.mark.slow
def test_exit_codes(run_copy, tmp_path):
    config = tmp_path / "w.yaml"
    config.write_text(to_yaml(run_copy))

    def command(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", "verify", config, *options], capture_output=True, text=True
        )

    assert command("--report-only").returncode == 0
    flip(run_copy.root / "image_features" / "00001.tar")
    broken = command("--report-only")
    assert broken.returncode == 1 and "image_features/00001: " in broken.stdout
    repaired = command()
    assert repaired.returncode == 0 and "image_features: as before" in repaired.stdout
    assert command("--report-only").returncode == 0
