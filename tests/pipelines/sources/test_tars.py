"""Foreign tars: every sample kept or counted, damage refused or counted, the same bytes again."""

import io
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from foreign_tars import drops, picture, read, run, samples, write_tar
from PIL import Image

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError
from pipelines.sources import tars as tar_source
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.inputs import find_inputs
from pipelines.sources.tars import TarsConfig, TarWorker, jobs


def test_a_shard_for_each_tar_with_unique_ascending_keys(tmp_path):
    write_tar(tmp_path / "in" / "b.tar", samples(0, 3))
    write_tar(tmp_path / "in" / "a.tar", samples(3, 2))
    (tmp_path / "in" / "notes.md").write_text("not a tar")
    (tmp_path / "in" / "._a.tar").write_text("what a Mac leaves behind")
    sidecars = run(TarsConfig(path=str(tmp_path / "in")), tmp_path / "out")
    assert [(sidecar.name, sidecar.samples, sidecar.drops) for sidecar in sidecars] == [
        ("00000", 2, {}),
        ("00001", 3, {}),
    ]
    first, second = read(tmp_path / "out"), read(tmp_path / "out", "00001")
    assert list(first) == ["00000000000", "00000000001"]
    assert list(second) == ["00001000000", "00001000001", "00001000002"]
    sample = second["00001000002"]
    assert sample.keys() == {"jpg", "txt", "json"} and sample["txt"] == b"picture 2"
    assert sample["jpg"] == samples(0, 3)["sa_2.jpg"], "images pass unchanged"
    assert json.loads(sample["json"]) == {
        "key": "00001000002",
        "source_key": "sa_2",
        "source_file": "b.tar",
        "long": "a long caption of 2",
        "width": 40,
        "height": 48,
        "original_width": 40,
        "original_height": 48,
    }


def test_the_same_bytes_again_in_any_order_and_a_changed_tar_redoes_its_own_shard(tmp_path):
    for name in "abc":
        write_tar(tmp_path / "in" / f"{name}.tar", samples(ord(name), 4))
    config = TarsConfig(path=str(tmp_path / "in" / "*.tar"))
    run(config, tmp_path / "first")
    for index in (2, 0, 1, 0):
        run(config, tmp_path / "second", wanted=index)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    before = [job.inputs for job in jobs(config)]
    os.utime(tmp_path / "in" / "b.tar", ns=(1, 1))
    after = [job.inputs for job in jobs(config)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert all(inputs.keys() == {"file"} for inputs in before)


def test_images_are_fitted_where_a_size_is_asked_for(tmp_path):
    write_tar(
        tmp_path / "in.tar",
        {"a.png": picture("PNG"), "a.txt": b"x", "b.bmp": picture("BMP"), "b.txt": b"y"},
    )
    config = TarsConfig(path=str(tmp_path / "in.tar"))
    run(config, tmp_path / "out", IngestConfig(image_size=32, encode="jpg", quality=90))
    for members in read(tmp_path / "out").values():
        with Image.open(io.BytesIO(members["jpg"])) as image:
            assert image.size == (32, 32) and image.format == "JPEG"
        sizes = json.loads(members["json"])
        assert (sizes["width"], sizes["original_width"], sizes["original_height"]) == (32, 40, 48)
    run(config, tmp_path / "kept", IngestConfig(image_size=None, encode="webp", quality=90))
    assert [sorted(members) for members in read(tmp_path / "kept").values()] == [
        ["json", "png", "txt"],
        ["json", "txt", "webp"],
    ]


def test_every_bad_sample_is_counted_under_its_reason(tmp_path):
    good = picture()
    write_tar(
        tmp_path / "in.tar",
        [
            ("0.jpg", good), ("0.txt", b"fine"),
            ("1.txt", b"no image"),
            ("2.jpg", good),
            ("3.jpg", good), ("3.txt", b"caf\xe9"),
            ("4.jpg", b"junk" * 50), ("4.txt", b"x"),
            ("5.jpg", good), ("5.txt", b"x"), ("5.json", b"{"),
            ("6.jpg", good), ("6.txt", b"x"), ("6.json", b"[1]"),
            ("7.jpg", good), ("7.txt", b"x"), ("7.json", b'{"a": "\\ud800"}'),
            ("0.jpg", good), ("0.txt", b"again"),
            ("8.jpg", picture(size=(60, 60))), ("8.txt", b"x"),
            ("9.jpg", good), ("9.txt", b"fine too"),
        ],
    )  # fmt: skip
    ingest = IngestConfig(image_size=None, max_pixels=3000, max_drop_fraction=1)
    (sidecar,) = run(TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out", ingest)
    assert sidecar.samples == 2 and sidecar.drops == {
        "duplicate_key": 1,
        "no_caption": 1,
        "no_image": 1,
        "too_many_pixels": 1,
        "undecodable_caption": 1,
        "undecodable_image": 1,
        "undecodable_metadata": 3,
    }
    assert [members["txt"] for members in read(tmp_path / "out").values()] == [b"fine", b"fine too"]
    listed = drops(tmp_path / "out")
    assert [int(key) for key, _, _ in listed] == list(range(1, 10))
    assert listed[7][1:] == ("duplicate_key", "0: the tar has this key before")
    with pytest.raises(ShardError, match="8 of 11 samples dropped"):
        run(TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out", IngestConfig(image_size=None))


def test_the_caption_may_be_a_field_of_the_json(tmp_path):
    members = samples(0, 2) | {
        "z.jpg": picture(),
        "z.json": b"{}",
        "y.jpg": picture(),
        "y.json": b'{"long": 3}',
    }
    write_tar(tmp_path / "in.tar", members)
    config = TarsConfig(path=str(tmp_path / "in.tar"), caption_field="long")
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.drops == {"no_caption": 1, "not_text": 1}
    assert [one["txt"] for one in read(tmp_path / "out").values()] == [
        b"a long caption of 0",
        b"a long caption of 1",
    ]


@pytest.mark.parametrize("cut", [1024 + 700, 2048, "last"])
def test_a_truncated_tar_fails_unless_asked_to_keep(tmp_path, cut):
    path = write_tar(tmp_path / "in.tar", samples(0, 5))
    with tarfile.open(path) as archive:
        infos = archive.getmembers()
    end = infos[-1].offset_data + 512 if cut == "last" else infos[6].offset + cut
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ShardError, match=r"in\.tar: .*damaged, after \d samples.*on_truncated=keep"):
        run(TarsConfig(path=str(path)), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    (sidecar,) = run(TarsConfig(path=str(path), on_truncated="keep"), tmp_path / "out")
    kept = 4 if cut == "last" else 2
    assert sidecar.samples == kept and sidecar.drops == {"truncated_tar": 1}
    assert drops(tmp_path / "out") == [
        (f"0000000000{kept}", "truncated_tar", f"in.tar: cut short or damaged after {kept} samples")
    ]


@pytest.mark.parametrize("on_truncated", ["fail", "keep"])
def test_what_is_no_tar_at_all_fails(tmp_path, on_truncated):
    (tmp_path / "in.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ShardError, match=r"in\.tar: not a tar, or cut short.*after 0 samples.*; replace it$"):
        run(TarsConfig(path=str(tmp_path / "in.tar"), on_truncated=on_truncated), tmp_path / "out")


def test_a_tar_that_is_gone_says_so(tmp_path):
    path = write_tar(tmp_path / "in.tar", samples(0, 1))
    config = TarsConfig(path=str(path), on_truncated="keep")
    (job,) = jobs(config)
    path.unlink()
    with pytest.raises(ShardError, match=r"in\.tar: was there when the tars were listed, is gone"):
        TarWorker(Folder.at(tmp_path / "out"), config, IngestConfig())(job)


def test_probes_read_a_few_of_tars_spread_evenly(tmp_path):
    for index in range(20):
        write_tar(tmp_path / "in" / f"{index:02d}.tar", samples(index, 30))
    config = TarsConfig(path=str(tmp_path / "in"))
    assert abs(tar_source.num_entries(config) - 600) < 30
    probes = tar_source.probe_jobs(config, 64)
    assert [job.arguments["index"] for job in probes] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [job.arguments["index"] for job in tar_source.probe_jobs(config, 3, 1)] == [1, 7, 13]
    worker = TarWorker(Folder.at(tmp_path / "out"), config, IngestConfig(image_size=None))
    assert [worker(job).samples for job in probes] == [8] * 8


def test_inputs_at_any_url(tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", samples(0, 3))
    for place in ("bucket/one/a.tar", "bucket/two/a.tar", "bucket/readme.txt"):
        files.pipe_file(f"/{place}", (tmp_path / "a.tar").read_bytes())
    found = find_inputs("memory://bucket/*/a.tar", (".tar",), "source.path", {})
    assert [file.name for file in found] == ["one/a.tar", "two/a.tar"]
    sidecars = run(TarsConfig(path="memory://bucket/*/a.tar"), tmp_path / "out")
    assert [sidecar.samples for sidecar in sidecars] == [3, 3]
    assert json.loads(read(tmp_path / "out", "00001")["00001000000"]["json"])["source_file"] == "two/a.tar"
    assert [file.name for file in find_inputs("memory://bucket/one", (".tar",), "k", {})] == ["a.tar"]
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("path", ["nothing", "nothing/*.tar", "empty"])
def test_a_path_that_leads_nowhere_is_named(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"source\.path: .*{path[:5]}.* leads to no file; expected \.tar"):
        jobs(TarsConfig(path=str(tmp_path / path)))


def test_what_decides_the_bytes():
    base = tar_source.fingerprint_fields(TarsConfig(path="a"), IngestConfig())
    same = tar_source.fingerprint_fields(
        TarsConfig(path="b", on_truncated="keep", options={"x": 1}), IngestConfig(num_threads=3)
    )
    assert base == same and base["ingest.image_size"] == 64
    assert base != tar_source.fingerprint_fields(TarsConfig(path="a", caption_field="long"), IngestConfig())


def test_tars_in_a_bucket_and_out_of_it(tmp_path, s3_folder):
    for index in range(2):
        path = write_tar(tmp_path / f"{index}.tar", samples(index, 4))
        s3_folder.write(f"{index}.tar", path.read_bytes())
    local = TarsConfig(path=str(tmp_path))
    remote = TarsConfig(path=s3_folder.url, options=dict(s3_folder.options))
    expected = {one.name: one.sha256 for one in run(local, tmp_path / "out")}
    worker = TarWorker(s3_folder / "out", remote, IngestConfig(image_size=None))
    listed = jobs(remote)
    assert {job.name: worker(job).sha256 for job in listed} == expected and len(expected) == 2
    s3_folder.write("1.tar", (tmp_path / "0.tar").read_bytes())
    changed = [old.inputs == new.inputs for old, new in zip(listed, jobs(remote), strict=True)]
    assert changed == [True, False]
    (pattern,) = jobs(remote.model_copy(update={"path": f"{s3_folder.url}/[1].tar"}))
    assert pattern.arguments["file"].name == "1.tar"


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["tars", "folder", "parquet"])
def test_two_actors_give_the_same_bytes(tmp_path, pool, kind):
    """Every source that needs no download, as the pool runs it."""
    import pyarrow as pa

    from pipelines.runtime.pool import ActorsConfig, run_shards
    from pipelines.sources import folder as folder_source
    from pipelines.sources import parquet as parquet_source
    from pipelines.sources.folder import FolderConfig, FolderWorker
    from pipelines.sources.parquet import ParquetConfig, ParquetWorker

    pictures = [picture(colour=["red", "green", "blue"][index % 3]) for index in range(12)]
    (tmp_path / "in").mkdir()
    match kind:
        case "tars":
            for index in range(3):
                write_tar(tmp_path / "in" / f"{index}.tar", samples(index, 4))
            config, worker, listed = TarsConfig(path=str(tmp_path / "in")), TarWorker, jobs
        case "folder":
            for index, data in enumerate(pictures):
                (tmp_path / "in" / f"{index}.jpg").write_bytes(data)
                (tmp_path / "in" / f"{index}.txt").write_text("x")
            config, worker = FolderConfig(path=str(tmp_path / "in"), shard_size=4), FolderWorker
            listed = folder_source.jobs
        case _:
            pq.write_table(
                pa.table({"image": pictures, "caption": ["x"] * 12}), tmp_path / "in" / "a.parquet"
            )
            config, worker = ParquetConfig(path=str(tmp_path / "in"), shard_size=4), ParquetWorker
            listed = parquet_source.jobs
    ingest = IngestConfig(image_size=16)
    todo = listed(config)
    alone = worker(Folder.at(tmp_path / "alone"), config, ingest)
    expected = {job.name: alone(job).sha256 for job in todo}
    arguments = {"folder": Folder.at(tmp_path / "pool"), "config": config, "ingest": ingest}
    made = run_shards(pool, "ingest", worker, arguments, todo, ActorsConfig(num_actors=2))
    assert {name: sidecar.sha256 for name, sidecar in made.items()} == expected and len(expected) == 3
