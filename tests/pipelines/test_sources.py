"""Scenes as files, the loopback server, url lists, and which samples curate drops."""

import io
import json
import socket
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.curate import CurateConfig, judge
from pipelines.ingest import IngestConfig, IngestWorker, drop_reason
from pipelines.pool import ShardJob
from pipelines.scenes_source import (
    DefectsConfig,
    ScenesConfig,
    SceneWorker,
    defect_positions,
    serve,
    to_uint8,
)
from pipelines.store import ShardError, read_samples
from pipelines.url_source import UrlsConfig, read_list


def png(side: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_bytes_are_rounded_not_truncated():
    pixels = np.broadcast_to(
        np.array([0.499 / 255, 0.5001 / 255, 254.9 / 255], np.float32)[:, None, None], (3, 2, 2)
    )
    assert to_uint8(pixels)[0, 0].tolist() == [0, 1, 255]


def test_scenes_are_the_same_whatever_the_shards(tmp_path):
    config = ScenesConfig(num_samples=12, defects=DefectsConfig(missing=1, undecodable=1, empty_caption=1))
    whole = SceneWorker(tmp_path / "a", config)(ShardJob("00000", "f", {}, {"start": 0, "stop": 12}))
    for name, start in (("00000", 0), ("00001", 6)):
        SceneWorker(tmp_path / "b", config)(ShardJob(name, "f", {}, {"start": start, "stop": start + 6}))
    rows = pq.read_table(tmp_path / "a" / "00000.parquet").to_pylist()
    halves = [
        row
        for name in ("00000", "00001")
        for row in pq.read_table(tmp_path / "b" / f"{name}.parquet").to_pylist()
    ]
    assert whole.samples == 12
    for row, half in zip(rows, halves, strict=True):
        assert {**row, "url": ""} == {**half, "url": ""}
        files = [tmp_path / folder / url for folder, url in (("a", row["url"]), ("b", half["url"]))]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    kinds = defect_positions(config)
    assert sorted(kinds.values()) == ["empty_caption", "missing", "undecodable"]
    assert [row["caption"] == "" for row in rows] == [kinds.get(i) == "empty_caption" for i in range(12)]
    assert json.loads(rows[0]["facts"])["things"]


def test_more_defects_than_samples_are_refused():
    with pytest.raises(ValueError, match="3 defects in 2 samples"):
        defect_positions(ScenesConfig(num_samples=2, defects=DefectsConfig(missing=3)))


def test_the_server_serves_and_stops(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with serve(tmp_path) as address:
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(address + "a.txt").read() == b"hello"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "none.txt")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address + "a.txt", timeout=2)


def test_a_taken_port_is_a_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"cannot serve .* port {port}.*source\.port"),
            serve(tmp_path, port),
        ):
            pass


def test_url_lists(tmp_path):
    pq.write_table(pa.table({"link": ["u1", "u2"], "text": ["a", None]}), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("link,text\nu1,a\nu2,\n")
    for name in ("l.parquet", "l.csv"):
        config = UrlsConfig(path=tmp_path / name, url_column="link", caption_column="text")
        assert read_list(config).to_pylist() == [{"url": "u1", "caption": "a"}, {"url": "u2", "caption": ""}]
    with pytest.raises(ValueError, match="no column 'url'"):
        read_list(UrlsConfig(path=tmp_path / "l.csv"))
    with pytest.raises(ValueError, match="is not a file"):
        read_list(UrlsConfig(path=tmp_path / "none.csv"))


def write_list(folder, urls: list[str]) -> None:
    rows = {"key": [f"{i:09d}" for i in range(len(urls))], "url": urls, "caption": ["a thing"] * len(urls)}
    pq.write_table(pa.table(rows), folder / "00000.parquet")


def test_ingest_resizes_and_keeps_every_row(tmp_path):
    for name, side in (("big.png", 64), ("same.png", 32)):
        (tmp_path / name).write_bytes(png(side))
    (tmp_path / "bad.png").write_bytes(b"no image")
    write_list(tmp_path, ["same.png", "bad.png", "none.png", "big.png"])
    with serve(tmp_path) as address:
        worker = IngestWorker(tmp_path / "out", tmp_path, IngestConfig(retries=0), address)
        sidecar = worker(ShardJob("00000", "f"))
    assert (sidecar.samples, sidecar.drops) == (2, {"http_404": 1, "undecodable_image": 1})
    samples = dict(read_samples(tmp_path / "out" / "00000.tar", sidecar))
    assert list(samples) == ["000000000", "000000003"]
    assert Image.open(io.BytesIO(samples["000000003"]["png"])).size == (32, 32)
    metadata = json.loads(samples["000000003"]["json"])
    # the address that happened to serve it is not part of the data
    assert metadata["url"] == "big.png" and metadata["original_width"] == 64


def test_an_outage_fails_the_shard_instead_of_dropping_it_all(tmp_path):
    write_list(tmp_path, ["a.png", "b.png"])
    with serve(tmp_path) as address:
        worker = IngestWorker(tmp_path / "out", tmp_path, IngestConfig(retries=0), address)
        with pytest.raises(ShardError, match=r"2 of 2 samples dropped.*http_404 2"):
            worker(ShardJob("00000", "f"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("failed_to_download", "HTTP Error 404: Not Found", "http_404"),
        ("failed_to_download", "<urlopen error timed out>", "timeout"),
        ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", "failed_to_download"),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", "robots_disallowed"),
        ("failed_to_resize", "Image decoding error", "undecodable_image"),
        ("failed_to_resize", "image too small", "failed_to_resize"),
    ],
)
def test_reasons(status, message, reason):
    assert drop_reason(status, message) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"png": b"no image"}, "undecodable_image"),
        ({"png": png()[:-40]}, "undecodable_image"),
        ({"png": png(8)}, "image_too_small"),
        ({"json": b'{"original_width": 9, "original_height": 50}'}, "image_too_small"),
        ({"json": b"{"}, "undecodable_metadata"),
        ({"txt": b"  \n"}, "empty_caption"),
        ({"txt": b"ab"}, "caption_too_short"),
        ({"txt": b"a" * 99}, "caption_too_long"),
        ({"txt": b"\xff\xfe"}, "undecodable_caption"),
        ({"png": None}, "no_image"),
        ({"txt": None}, "no_caption"),
    ],
)
def test_curate_judges(change, reason):
    members = {"png": png(), "txt": b"a red circle", "json": b"{}"} | change
    config = CurateConfig(min_caption_chars=3, max_caption_chars=50)
    verdict = judge({name: data for name, data in members.items() if data is not None}, config)
    assert (verdict and verdict[0]) == reason
