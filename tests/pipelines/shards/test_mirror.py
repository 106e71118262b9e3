"""A remote column's copy for training: whole, checked, and no byte fetched twice."""

import threading
from pathlib import Path

import pytest

from pipelines.shards.manifest import Manifest, ShardTable, read_output, write_output
from pipelines.shards.mirror import mirror
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, side_file
from pipelines.shards.tars import tar_shard
from repfusion.files import file_sha256


@pytest.fixture(params=["local", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return request.getfixturevalue("s3_folder") if request.param == "s3" else Folder.at(tmp_path / "source")


def write_column(folder: Folder, scratch: Path, contents: list[bytes]) -> None:
    """A complete stage with a shard for each content and a file of its own."""
    sidecars: list[Sidecar] = []
    for index, content in enumerate(contents):
        with ShardCommit(folder, f"{index:05d}", "f", {}) as commit:
            with tar_shard(commit) as samples:
                samples.write(f"{index:09d}", {"txt": content})
            sidecars.append(commit.commit(f"{index:05d}.tar"))
    scratch.mkdir(exist_ok=True)
    (scratch / "statistics").write_bytes(b"".join(contents))
    files = {"statistics": side_file(scratch / "statistics")}
    folder.put("statistics", scratch / "statistics")
    shards = ShardTable.of(sidecars)
    manifest = Manifest(
        stage="image_features",
        fingerprint="f",
        fields={},
        upstream={},
        lineage={},
        num_shards=len(shards),
        samples=shards.samples,
        bytes=shards.bytes,
        shards_digest=shards.digest,
        drops={},
        seconds=1.0,
        shard_seconds=1.0,
        files=files,
        extra={},
    )
    write_output(folder, manifest, shards)


def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the tars that are opened from here on."""
    opened: list[str] = []
    real = Folder.open

    def record(self: Folder, name: str):
        opened.append(name)
        return real(self, name)

    monkeypatch.setattr(Folder, "open", record)
    return opened


def test_a_copy_is_whole_and_follows_its_source(source, tmp_path, monkeypatch):
    write_column(source, tmp_path / "x", [b"a", b"b", b"c"])
    target = tmp_path / "columns" / "image_features"
    opened = fetched(monkeypatch)
    mirror(source, target)
    assert sorted(opened) == ["00000.tar", "00001.tar", "00002.tar", "statistics"]
    names = {"00000.tar", "00001.tar", "00002.tar", "statistics", "shards.parquet", "manifest.json", ".lock"}
    assert {path.name for path in target.iterdir()} == names
    for name in names - {".lock"}:
        assert (target / name).read_bytes() == source.read(name)

    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    mirror(source, target)
    assert opened[4:] == [] and {path: path.stat().st_mtime_ns for path in target.iterdir()} == before

    # the second shard changes, the third goes
    write_column(source, tmp_path / "x", [b"a", b"B"])
    mirror(source, target)
    assert sorted(opened[4:]) == ["00001.tar", "statistics"]
    copy, original = read_output(Folder.at(target)), read_output(source)
    assert copy is not None and original is not None and copy.manifest == original.manifest
    assert not (target / "00002.tar").exists()
    assert [file_sha256(target / shard.file) for shard in copy.shards] == copy.shards.column("sha256")


def test_a_copy_that_was_cut_short_goes_on(source, tmp_path, monkeypatch):
    write_column(source, tmp_path / "x", [b"a", b"b", b"c"])
    target = tmp_path / "copy"
    mirror(source, target)
    (target / "manifest.json").unlink()
    (target / "00002.tar").unlink()
    (target / ".mirror.abc.tmp").mkdir()
    (target / "00001.tar").write_bytes(bytes((target / "00001.tar").stat().st_size))
    opened = fetched(monkeypatch)
    mirror(source, target)
    assert sorted(opened) == ["00001.tar", "00002.tar"]
    assert (target / "00001.tar").read_bytes() == source.read("00001.tar")
    assert not list(target.glob("*.tmp")) and not list(target.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["00001.tar", "statistics"])
def test_a_file_that_someone_removed_comes_again(source, tmp_path, name):
    write_column(source, tmp_path / "x", [b"a", b"b"])
    mirror(source, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    mirror(source, tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_bytes() == source.read(name)


@pytest.mark.parametrize("name", ["00001.tar", "statistics"])
def test_a_changed_byte_at_the_source_is_noticed(source, tmp_path, name):
    write_column(source, tmp_path / "x", [b"a", b"b"])
    data = source.read(name)
    source.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ShardError, match=rf"{name}: its bytes are not those that were written; run 'verify'"):
        mirror(source, tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()
    source.write(name, data)
    mirror(source, tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_bytes() == data


def test_of_several_at_once_one_copies(source, tmp_path, monkeypatch):
    write_column(source, tmp_path / "x", [b"a", b"b"])
    opened = fetched(monkeypatch)
    threads = [threading.Thread(target=mirror, args=(source, tmp_path / "copy")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(opened) == ["00000.tar", "00001.tar", "statistics"]


def test_an_incomplete_stage_is_refused(source, tmp_path):
    with pytest.raises(ShardError, match="not complete; run the stage"):
        mirror(source, tmp_path / "copy")
