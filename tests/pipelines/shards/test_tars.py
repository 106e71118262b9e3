"""Tar shards: the bytes webdataset would write, tars of other writers, damage named."""

import io
import tarfile
from pathlib import Path

import pytest

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar
from pipelines.shards.tars import read_samples, tar_shard


def write_shard(path: Path, num_samples: int = 5) -> Sidecar:
    with ShardCommit(Folder.at(path), "00000", "f" * 64, {}) as commit:
        with tar_shard(commit) as samples:
            for index in range(num_samples):
                samples.write(
                    f"{index:09d}", {"txt": f"caption {index}".encode(), "png": bytes([index]) * 700}
                )
        return commit.commit("00000.tar")


@pytest.mark.parametrize("stem", ["", "folder/" * 15])
def test_our_bytes_are_those_of_webdatasets_own_writer(tmp_path, stem):
    from webdataset.writer import TarWriter

    folder = Folder.at(tmp_path)
    samples = {f"{stem}{i:09d}": {"txt": b"x" * (i * 511), "features.npy": b"y" * 512} for i in range(4)}
    with (tmp_path / "theirs.tar").open("wb") as stream:
        writer = TarWriter(stream, encoder=False, mtime=0)
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
        writer.close()
    with ShardCommit(folder, "00000", "f", {}) as commit:
        with tar_shard(commit) as ours:
            for key, members in samples.items():
                ours.write(key, members)
        commit.commit("00000.tar")
    assert (tmp_path / "00000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert dict(read_samples(folder, "theirs.tar")) == samples
    some = dict(read_samples(folder, "theirs.tar", wanted=["txt"]))
    assert some == {key: {"txt": members["txt"]} for key, members in samples.items()}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_writers_read_too(tmp_path, kind):
    names = ["a/1.jpg", "a/1.txt", "a/" + "long" * 35 + ".jpg", "b.c/2.jpg"]
    names = [name for name in names if kind != tarfile.USTAR_FORMAT or len(name) < 100]
    with tarfile.open(tmp_path / "00000.tar", "w", format=kind) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    read = dict(read_samples(Folder.at(tmp_path), "00000.tar"))
    assert read["a/1"] == {"jpg": b"abc", "txt": b"abc"} and read["b.c/2"] == {"jpg": b"abc"}
    assert len(read) == len(names) - 1


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    write_shard(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(5)]
    assert samples[0]["txt"] == b"caption 0"


def test_a_shard_without_samples_is_a_tar_too(tmp_path):
    sidecar = write_shard(tmp_path, num_samples=0)
    assert sidecar.bytes == tarfile.RECORDSIZE
    assert list(read_samples(Folder.at(tmp_path), "00000.tar", sidecar)) == []
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert archive.getmembers() == []


@pytest.mark.parametrize("cut", [0, 100, 512, 2048, "inside the last member", "before the end mark"])
@pytest.mark.parametrize("with_sidecar", [True, False])
def test_a_truncated_tar_is_named(tmp_path, cut, with_sidecar):
    sidecar = write_shard(tmp_path)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    ends = {"inside the last member": last.offset_data + 3, "before the end mark": last.offset_data + 512}
    path.write_bytes(path.read_bytes()[: ends.get(cut, cut)])
    with pytest.raises(ShardError, match=r"00000\.tar.*truncated"):
        list(read_samples(Folder.at(tmp_path), "00000.tar", sidecar if with_sidecar else None))


def test_a_flipped_byte_is_noticed(tmp_path):
    sidecar = write_shard(tmp_path)
    path = tmp_path / "00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 2")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="bytes changed"):
        list(read_samples(Folder.at(tmp_path), "00000.tar", sidecar))


def test_a_flipped_byte_in_a_member_that_is_not_wanted_is_noticed_too(tmp_path):
    sidecar = write_shard(tmp_path)
    path = tmp_path / "00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(bytes([2]) * 700) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="bytes changed"):
        list(read_samples(Folder.at(tmp_path), "00000.tar", sidecar, wanted=["txt"]))


def test_what_is_not_a_tar_is_an_error(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"x" * 4096 + bytes(1024))
    with pytest.raises(ShardError, match="not readable as a tar"):
        list(read_samples(Folder.at(tmp_path), "00000.tar"))
    with pytest.raises(ShardError, match="no such file"):
        list(read_samples(Folder.at(tmp_path), "00001.tar"))


def test_keys_must_ascend(tmp_path):
    with (
        pytest.raises(ValueError, match="keys must ascend"),
        ShardCommit(Folder.at(tmp_path), "00000", "f", {}) as commit,
    ):
        with tar_shard(commit) as samples:
            samples.write("000000001", {"txt": b"a"})
            samples.write("000000001", {"txt": b"a"})
