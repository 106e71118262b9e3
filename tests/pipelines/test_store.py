"""Shards on disk: the same bytes each time, damage detected, drops listed, nothing left behind."""

import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.store import (
    ShardCommit,
    ShardError,
    Sidecar,
    atomic_path,
    canonical_json,
    missing_files,
    read_samples,
    read_sidecar,
    tar_shard,
)


def write_shard(folder: Path, num_samples: int = 5) -> Sidecar:
    with ShardCommit(folder, "00000", "f" * 64, {"source": "a" * 64}) as commit:
        with tar_shard(commit) as samples:
            for index in range(num_samples):
                samples.write(
                    f"{index:09d}", {"txt": f"caption {index}".encode(), "png": bytes([index]) * 700}
                )
        commit.drop("000000009", "http_404", "HTTP Error 404: Not Found")
        commit.write_drops()
        return commit.commit("00000.tar")


def test_a_shard_reads_back_and_its_bytes_are_reproducible(tmp_path):
    first, second = write_shard(tmp_path / "a"), write_shard(tmp_path / "b")
    for name in (first.file, *first.files):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first.sha256 == second.sha256 and first.samples == 5 and first.drops == {"http_404": 1}
    samples = list(read_samples(tmp_path / "a" / "00000.tar", read_sidecar(tmp_path / "a", "00000")))
    assert [key for key, _ in samples] == [f"{index:09d}" for index in range(5)]
    assert samples[3][1] == {"txt": b"caption 3", "png": bytes([3]) * 700}
    drops = pq.read_table(tmp_path / "a" / "00000.drops.parquet").to_pylist()
    assert drops == [{"key": "000000009", "reason": "http_404", "detail": "HTTP Error 404: Not Found"}]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "00000.drops.parquet",
        "00000.json",
        "00000.tar",
    ]


@pytest.mark.parametrize("stem", ["", "folder/" * 15])
def test_our_bytes_are_those_of_webdatasets_own_writer(tmp_path, stem):
    from webdataset.writer import TarWriter

    samples = {f"{stem}{i:09d}": {"txt": b"x" * (i * 511), "features.npy": b"y" * 512} for i in range(4)}
    with (tmp_path / "theirs.tar").open("wb") as stream:
        writer = TarWriter(stream, encoder=False, mtime=0)
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
        writer.close()
    with ShardCommit(tmp_path, "00000", "f", {}) as commit:
        with tar_shard(commit) as ours:
            for key, members in samples.items():
                ours.write(key, members)
        commit.commit("00000.tar")
    assert (tmp_path / "00000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert dict(read_samples(tmp_path / "theirs.tar")) == samples
    some = dict(read_samples(tmp_path / "theirs.tar", wanted=["txt"]))
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
    read = dict(read_samples(tmp_path / "00000.tar"))
    assert read["a/1"] == {"jpg": b"abc", "txt": b"abc"} and read["b.c/2"] == {"jpg": b"abc"}
    assert len(read) == len(names) - 1


def test_webdataset_reads_our_shards(tmp_path):
    import webdataset

    write_shard(tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(5)]
    assert samples[0]["txt"] == b"caption 0"


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
        list(read_samples(path, sidecar if with_sidecar else None))
    assert missing_files(tmp_path, sidecar) == ["00000.tar"]


def test_a_flipped_byte_is_noticed(tmp_path):
    sidecar = write_shard(tmp_path)
    path = tmp_path / "00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 2")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="bytes changed"):
        list(read_samples(path, sidecar))


def test_what_is_not_a_tar_is_an_error(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(b"x" * 4096 + bytes(1024))
    with pytest.raises(ShardError, match="not readable as a tar"):
        list(read_samples(path))
    with pytest.raises(ShardError, match="no such file"):
        list(read_samples(tmp_path / "00001.tar"))


def test_an_exception_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyError),
        ShardCommit(tmp_path, "00000", "f", {}) as commit,
        tar_shard(commit) as samples,
    ):
        samples.write("000000000", {"txt": b"a"})
        raise KeyError("on purpose")
    with pytest.raises(KeyError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError("on purpose")
    assert list(tmp_path.iterdir()) == []


def test_keys_must_ascend(tmp_path):
    with (
        pytest.raises(ValueError, match="keys must ascend"),
        ShardCommit(tmp_path, "00000", "f", {}) as commit,
    ):
        with tar_shard(commit) as samples:
            samples.write("000000001", {"txt": b"a"})
            samples.write("000000001", {"txt": b"a"})


def test_too_many_drops_fail_with_their_reasons(tmp_path):
    with ShardCommit(tmp_path, "00000", "f", {}) as commit:
        commit.samples = 1
        for key in "abc":
            commit.drop(key, "http_503", "HTTP Error 503")
        commit.check_drops(0.75)
        with pytest.raises(ShardError, match=r"3 of 4 samples dropped.*http_503 3"):
            commit.check_drops(0.5)


def test_canonical_json_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
