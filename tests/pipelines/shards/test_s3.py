"""The whole data workflow on a real S3 server: the bytes of a run on local disk, and all commands over it."""

import subprocess
import sys
import time

import pytest
from running import DATA_STAGES, data_files, found, manifests, ran, run_all, statuses
from unsteady_proxy import unsteady

from pipelines.build import build_stages, data_stages, probe_stages, source_entries
from pipelines.commands import main
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from pipelines.shards.store import read_sidecar
from pipelines.workflow.collect import find_garbage
from pipelines.workflow.plan import plan
from pipelines.workflow.verify import QUARANTINE, verify
from repfusion.config import to_yaml

pytestmark = pytest.mark.ray
URL = "s3://data/workflows/one"


@pytest.fixture(scope="module")
def remote(configure, pool, s3_options, tmp_path_factory):
    """`complete_run`'s workflow with its data on S3, run once."""
    root = tmp_path_factory.mktemp("s3") / "run"
    config = configure(root, data_url=URL, storage_options=s3_options)
    results, _ = run_all(config, pool)
    return config, manifests(results)


def stamps(folder: Folder) -> dict[str, object]:
    """When each object was written, by its path; moto's ETags are hashes of content, so dates it is."""
    return {
        f"{stage}/{entry['name'].rpartition('/')[2]}": entry["LastModified"]
        for stage in DATA_STAGES
        for entry in folder._files.ls(f"{folder.url}/{stage}", detail=True)
        if entry["type"] == "file"
    }


@pytest.mark.slow
def test_the_bytes_are_those_of_a_local_run(remote, complete_run):
    config, made = remote
    assert data_files(config.data_folder) == data_files(complete_run.data_folder)
    for name, state in found(complete_run).items():
        assert made[name].shards_digest == state.output.manifest.shards_digest
        assert made[name].digest == state.output.manifest.digest
    assert not list(config.root.glob("*/*.tar"))
    assert config.data_folder.folders() == set(DATA_STAGES)


def test_a_second_run_does_nothing(remote, pool):
    config, _ = remote
    before = stamps(config.data_folder)
    results, _ = run_all(config, pool)
    assert ran(results) == []
    assert stamps(config.data_folder) == before
    assert set(statuses(config).values()) == {"fresh"}


def test_status_names_what_changed(remote, configure, s3_options):
    config, _ = remote
    other = configure(config.root, data_url=URL, storage_options=s3_options, curate={"max_caption_chars": 60})
    states = found(other)
    assert states["ingest"].status == "fresh"
    assert states["judge"].reason == "curate.max_caption_chars 1000 -> 60"


@pytest.mark.slow
def test_a_deleted_object_and_a_changed_one_are_made_good(remote, pool, complete_run):
    """In one test, as each of the two leaves the workflow complete."""
    config, _ = remote
    folder, said = config.data_folder, []
    expected = data_files(complete_run.data_folder)

    before = stamps(folder)
    (folder / "image_features").remove("00002.tar")
    assert (
        found(config)["image_features"].reason == "1 of 4 shards to do: 00002.tar missing or of another size"
    )
    results, _ = run_all(config, pool)
    assert ran(results) == ["image_features"] and data_files(folder) == expected
    after = stamps(folder)
    again = {name for name in after if after[name] != before.get(name)}
    whole = {
        "image_features/statistics.safetensors",
        "image_features/manifest.json",
        "image_features/shards.parquet",
    }
    shard = {
        "image_features/00002.tar",
        "image_features/00002.json",
        "image_features/00002.statistics.safetensors",
    }
    assert again == whole | shard | {"image_features/stage.json"}

    data = (folder / "curate").read("00001.tar")
    (folder / "curate").write("00001.tar", data[:700] + bytes([data[700] ^ 1]) + data[701:])
    before = stamps(folder)
    broken = verify(data_stages(config), config.root, config.ray, True, said.append, pool)
    assert [(one.stage, one.name) for one in broken] == [("curate", "00001")]
    assert (folder / "curate" / QUARANTINE).names() >= {"00001.tar", "00001.json"}
    assert data_files(folder) == expected
    after = stamps(folder)
    again = {name for name in after if after[name] != before.get(name) and name.rpartition("/")[2][0] == "0"}
    assert {name.partition(".")[0] for name in again} == {"curate/00001"}

    found_garbage = find_garbage([build_stages(config)], [config.root])
    assert [str(one.folder) for one in found_garbage] == [f"{URL}/curate/{QUARANTINE}"]
    assert found_garbage[0].bytes >= len(data)
    for one in found_garbage:
        one.delete()
    assert (folder / "curate").folders() == set()
    assert find_garbage([build_stages(config)], [config.root]) == []
    assert set(statuses(config).values()) == {"fresh"}


def test_a_plan_of_what_is_complete_asks_nothing_of_the_source(remote):
    config, made = remote
    plans = plan(data_stages(config), lambda: source_entries(config), probe_stages(config))
    assert {one.name: one.bytes for one in plans} == {name: one.bytes for name, one in made.items()}


def test_training_reads_a_checked_copy(remote, complete_run):
    from repfusion.data.dataset import ColumnDataset
    from repfusion.data.readers import SampleArray

    config, _ = remote
    data, original = config.training("train").data, complete_run.training("train").data
    readers = {"image_features": SampleArray()}
    features = data.columns["image_features"]
    assert data.images == config.root / "columns" / "curate"
    for name, place in (("curate", data.images), ("image_features", features)):
        mirror(config.data_folder / name, place)
    copy = ColumnDataset(data.images, data.columns, readers)
    assert len(copy) == len(ColumnDataset(original.images, original.columns, readers)) == 34
    assert (features / "statistics.safetensors").read_bytes() == (
        complete_run.root / "image_features" / "statistics.safetensors"
    ).read_bytes()


def test_a_bucket_that_is_not_there_is_an_error(configure, tmp_path, s3_options, pool):
    config = configure(
        tmp_path / "run",
        data_url="s3://nobody-made-this/x",
        storage_options=s3_options,
        source={"actors": {"max_attempts": 1}},
    )
    assert set(statuses(config).values()) == {"missing"}
    with pytest.raises((OSError, ValueError), match=r"(?i)bucket"):
        run_all(config, pool)


def test_a_store_that_lets_nobody_in_is_an_error_without_a_traceback(
    configure, tmp_path, s3_options, monkeypatch, capsys
):
    options = {**s3_options, "config_kwargs": {"retries": {"max_attempts": 1}}}
    config = configure(tmp_path / "run", data_url=URL, storage_options=options)
    (tmp_path / "w.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(sys, "argv", ["pipelines", "status", str(tmp_path / "w.yaml")])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert main() == 1
    assert (
        f"error: data_url: {URL}: NoCredentialsError: Unable to locate credentials" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_changes_nothing(configure, pool, s3_options, tmp_path, complete_run):
    """Each ninth request is answered with 503, not at all, or in half."""
    with unsteady(s3_options["endpoint_url"], period=9) as proxy:
        config = configure(
            tmp_path / "run",
            data_url="s3://data/workflows/unsteady",
            storage_options={"endpoint_url": proxy.address},
        )
        run_all(config, pool)
        assert all(proxy.faults[fault] >= 5 for fault in ("slow down", "hang up", "cut short"))
    steady = Folder("s3://data/workflows/unsteady", s3_options)
    assert data_files(steady) == data_files(complete_run.data_folder)


UPLOAD = """
import sys
from pathlib import Path
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit

url, endpoint = sys.argv[1:]
with ShardCommit(Folder(url, {"endpoint_url": endpoint}), "00000", "f", {}) as commit:
    with (commit.staging / "00000.tar").open("wb") as stream:
        stream.truncate(400 << 20)
    commit.commit("00000.tar")
"""


@pytest.mark.slow
def test_an_upload_that_is_killed_leaves_nothing(s3_folder, s3_options):
    """Large files go up in parts: no object appears before the last, and no sidecar at all."""
    import boto3

    bucket, _, prefix = s3_folder.url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", **s3_options)
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, s3_folder.url, s3_options["endpoint_url"]])
    try:
        while not client.list_multipart_uploads(Bucket=bucket).get("Uploads"):
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert s3_folder.sizes() == {} and read_sidecar(s3_folder, "00000") is None
    for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]:
        assert upload["Key"] == f"{prefix}/00000.tar"
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
