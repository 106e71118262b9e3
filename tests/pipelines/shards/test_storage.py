"""One interface over local disk, fsspec's memory and a real S3 server: whole files or none, listings without
surprises.
"""

import copy
import errno
import os
import pickle
import threading
from pathlib import Path

import pytest

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard


@pytest.fixture(params=["local", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    match request.param:
        case "local":
            return Folder.at(tmp_path / "place")
        case "file":
            return Folder.at(f"file://{tmp_path}/place")
        case "memory":
            return Folder.at(f"memory://{tmp_path}/place")
        case _:
            return request.getfixturevalue("s3_folder")


def test_a_missing_folder_is_an_empty_one(folder):
    assert folder.sizes() == {} and folder.names() == set() and folder.folders() == set()
    assert not folder.has("a") and list(folder.read_many(["a", "b"])) == []
    folder.remove("a")
    folder.clear()
    folder.remove_temporaries()
    for call in (folder.size, folder.read, folder.open):
        with pytest.raises(FileNotFoundError):
            call("a")
    with pytest.raises(FileNotFoundError), folder.local_copy("a"):
        pass


def test_what_is_written_is_listed_and_read(folder):
    folder.write("a", b"1")
    folder.write("b.json", b"22")
    (folder / "inner").write("c", b"333")
    assert folder.sizes() == {"a": 1, "b.json": 2}
    assert folder.names() == {"a", "b.json"} and folder.folders() == {"inner"}
    assert folder.has("a") and not folder.has("inner") and folder.size("b.json") == 2
    assert dict(folder.read_many(["a", "none", "b.json"])) == {"a": b"1", "b.json": b"22"}
    with folder.open("b.json") as stream:
        assert stream.read(1) == b"2" and stream.seek(0) == 0 and stream.read() == b"22"
    with folder.local_copy("a") as path:
        assert path.read_bytes() == b"1"
    folder.write("a", b"longer")
    assert folder.read("a") == b"longer" and folder.size("a") == 6


def test_a_file_is_created_whole_by_one_alone(folder):
    assert folder.create("a", b"1") and not folder.create("a", b"2")
    assert folder.read("a") == b"1" and folder.names() == {"a"}
    folder.remove("a")
    assert folder.create("a", b"3") and folder.read("a") == b"3"


def test_a_file_is_created_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = Folder.at(tmp_path / "place")
    assert folder.create("a", b"1") and not folder.create("a", b"2")
    assert folder.read("a") == b"1" and {path.name for path in folder.path.iterdir()} == {"a"}


def test_files_are_moved_and_removed(folder):
    folder.write("a", b"1")
    folder.write("b", b"2")
    with folder.staging("x") as staging:
        (staging / "c").write_bytes(b"3")
        assert folder.names() == {"a", "b"}
        folder.put("c", staging / "c")
        (staging / "left").write_bytes(b"4")
    assert folder.sizes() == {"a": 1, "b": 1, "c": 1} and folder.folders() == set()
    folder.move("a", folder / "aside")
    assert folder.names() == {"b", "c"} and (folder / "aside").read("a") == b"1"
    folder.remove("b", "none")
    assert folder.names() == {"c"}
    (folder / "aside").clear()
    assert folder.folders() == set() and folder.names() == {"c"}
    folder.clear()
    assert folder.sizes() == {}


def test_a_folder_travels_to_other_processes(folder):
    folder.write("a", b"1")
    for other in (pickle.loads(pickle.dumps(folder)), copy.copy(folder), Folder.at(folder)):
        assert other == folder and hash(other) == hash(folder) and other.read("a") == b"1"


def test_a_shard_is_committed_and_read(folder):
    with ShardCommit(folder, "00000", "f", {"source": "s"}) as commit:
        with tar_shard(commit) as samples:
            for index in range(3):
                samples.write(f"{index:09d}", {"txt": b"caption", "png": bytes(3000)})
        commit.drop("000000007", "http_404")
        commit.write_drops()
        sidecar = commit.commit("00000.tar")
    assert folder.names() == {"00000.tar", "00000.json", "00000.drops.parquet"}
    assert read_sidecar(folder, "00000") == sidecar
    assert len(list(read_samples(folder, "00000.tar", sidecar))) == 3
    data = folder.read("00000.tar")
    folder.write("00000.tar", data[:-2048])
    with pytest.raises(ShardError, match=r"00000\.tar.*truncated"):
        list(read_samples(folder, "00000.tar", sidecar))
    folder.write("00000.tar", data[:600] + b"X" + data[601:])
    with pytest.raises(ShardError, match="its bytes changed"):
        list(read_samples(folder, "00000.tar", sidecar))


def test_a_failed_upload_leaves_nothing_complete(folder, monkeypatch):
    """Files go up one by one, the sidecar last; what an earlier sidecar says is gone before the first."""

    def commit(text: bytes) -> None:
        with ShardCommit(folder, "00000", "f", {}) as commit:
            with tar_shard(commit) as samples:
                samples.write("000000000", {"txt": text})
            (commit.staging / "00000.more").write_bytes(text)
            commit.commit("00000.tar")

    commit(b"first")
    put = Folder.put

    def fails(self, name, source):
        if name.endswith(".tar"):
            raise ConnectionError("on purpose")
        put(self, name, source)

    monkeypatch.setattr(Folder, "put", fails)
    with pytest.raises(ConnectionError):
        commit(b"second")
    assert read_sidecar(folder, "00000") is None and not folder.has("00000.json")
    monkeypatch.undo()
    commit(b"second")
    assert folder.names() == {"00000.tar", "00000.more", "00000.json"}


def test_listings_see_what_others_write(s3_folder, s3_options):
    """A client that keeps listings would not; neither would one that keeps them per process or thread."""
    other = Folder(s3_folder.url, dict(s3_options))
    assert s3_folder.names() == set()
    other.write("a", b"1")
    assert s3_folder.names() == {"a"} and s3_folder.has("a")
    thread = threading.Thread(target=other.write, args=("b", b"2"))
    thread.start()
    thread.join()
    assert s3_folder.names() == {"a", "b"}
    other.remove("a")
    assert s3_folder.names() == {"b"} and not s3_folder.has("a")


def test_empty_objects_that_stand_for_folders_are_no_files(s3_folder, s3_options):
    """Consoles make an object `x/` for a new folder x."""
    import boto3

    client = boto3.client("s3", **s3_options)
    bucket, _, prefix = s3_folder.url.removeprefix("s3://").partition("/")
    for key in ("", "inner/"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"")
    assert s3_folder.names() == set() and s3_folder.folders() == {"inner"}
    s3_folder.write("a", b"1")
    assert s3_folder.sizes() == {"a": 1}
    assert (s3_folder / "inner").sizes() == {}


def test_folders_whose_names_begin_alike_are_told_apart(folder):
    (folder / "train").write("a", b"1")
    (folder / "train.stale-1").write("b", b"2")
    assert (folder / "train").names() == {"a"} and folder.folders() == {"train", "train.stale-1"}
    (folder / "train").clear()
    assert (folder / "train.stale-1").names() == {"b"}


def test_a_large_object_goes_up_in_parts_and_appears_whole(s3_folder, tmp_path):
    data = bytes(range(256)) * (60 << 12)  # 60 MiB, above s3fs's part size
    (tmp_path / "large").write_bytes(data)
    s3_folder.put("large", tmp_path / "large")
    assert not (tmp_path / "large").exists()
    assert s3_folder.sizes() == {"large": len(data)} and s3_folder.read("large") == data
    s3_folder.move("large", s3_folder / "aside")
    assert (s3_folder / "aside").read("large") == data


@pytest.mark.slow
def test_many_files_are_listed_in_pages_and_read_together(s3_folder):
    """S3 lists 1,000 objects at a time."""
    files = {f"{index:05d}.json": str(index).encode() for index in range(1005)}
    s3_folder._files.pipe({f"{s3_folder.url}/{name}": data for name, data in files.items()})
    assert s3_folder.names() == files.keys()
    assert dict(s3_folder.read_many(sorted(files))) == files


def test_a_killed_local_write_is_cleaned_up(tmp_path):
    folder = Folder.at(tmp_path)
    (tmp_path / ".00000.abc.tmp").mkdir()
    (tmp_path / ".00000.abc.tmp" / "half").write_bytes(b"1")
    (tmp_path / ".manifest.json.x.tmp").write_bytes(b"2")
    (tmp_path / "mine.tmp").write_bytes(b"3")
    assert folder.sizes() == {}
    folder.remove_temporaries()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_a_url_has_no_local_path():
    with pytest.raises(ValueError, match="s3://bucket/x is not on local disk"):
        _ = Folder("s3://bucket/x").path


@pytest.mark.parametrize("name", ["x*", "x?", "[x]"])
def test_a_url_that_would_be_a_pattern_is_refused(name):
    with pytest.raises(ValueError, match=r"s3://bucket/.* may not hold"):
        Folder(f"s3://bucket/{name}")
    with pytest.raises(ValueError, match="may not hold"):
        _ = Folder("s3://bucket") / name
    assert Folder(f"/tmp/{name}").path.name == name
