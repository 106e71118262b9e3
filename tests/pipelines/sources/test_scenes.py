"""Scenes as files in a tar, their list, and the loopback server."""

import json
import socket
import urllib.error
import urllib.request

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources.scenes import (
    DefectsConfig,
    ScenesConfig,
    SceneWorker,
    defect_positions,
    serve,
)
from repfusion.scenes.world import to_uint8

DEFECTS = DefectsConfig(missing=1, undecodable=1, empty_caption=1)


def draw(folder: Folder, config: ScenesConfig, name: str = "00000", **arguments: int) -> Sidecar:
    return SceneWorker(folder, config)(ShardJob(name, "f", {}, arguments))


def rows_of(folder: Folder, name: str = "00000") -> list[dict[str, str]]:
    return pq.read_table(folder.path / f"{name}.parquet").to_pylist()


def test_bytes_are_rounded_not_truncated():
    pixels = np.broadcast_to(
        np.array([0.499 / 255, 0.5001 / 255, 254.9 / 255], np.float32)[:, None, None], (3, 2, 2)
    )
    assert to_uint8(pixels)[0, 0].tolist() == [0, 1, 255]


def test_scenes_are_the_same_whatever_the_shards(tmp_path):
    config = ScenesConfig(num_samples=12, defects=DEFECTS)
    whole, halves = Folder.at(tmp_path / "whole"), Folder.at(tmp_path / "halves")
    assert draw(whole, config, start=0, stop=12).samples == 12
    for name, start in (("00000", 0), ("00001", 6)):
        draw(halves, config, name, start=start, stop=start + 6)
    both = [*rows_of(halves), *rows_of(halves, "00001")]
    for row, half in zip(rows_of(whole), both, strict=True):
        assert {**row, "url": ""} == {**half, "url": ""}
    images = [sample for name in ("00000", "00001") for sample in read_samples(halves, f"{name}.images.tar")]
    assert list(read_samples(whole, "00000.images.tar")) == images
    kinds = defect_positions(config)
    assert sorted(kinds.values()) == ["empty_caption", "missing", "undecodable"]
    for index, row in enumerate(rows_of(whole)):
        assert (row["caption"] == "") == (kinds.get(index) == "empty_caption")
        assert (row["key"] in dict(images)) == (kinds.get(index) != "missing")
    assert json.loads(rows_of(whole)[0]["facts"])["things"]


def test_a_shard_is_its_list_and_its_images(tmp_path):
    folder = Folder.at(tmp_path)
    sidecar = draw(folder, ScenesConfig(num_samples=4), start=0, stop=4)
    assert sidecar.file == "00000.parquet" and list(sidecar.files) == ["00000.images.tar"]
    assert folder.names() == {"00000.parquet", "00000.images.tar", "00000.json"}
    assert (
        draw(Folder.at(tmp_path / "b"), ScenesConfig(num_samples=4), start=0, stop=4).files == sidecar.files
    )


def test_every_third_scene(tmp_path):
    folder = Folder.at(tmp_path)
    assert draw(folder, ScenesConfig(num_samples=10), start=0, stop=10, step=3).samples == 4
    assert [row["key"] for row in rows_of(folder)] == ["000000000", "000000003", "000000006", "000000009"]


def test_more_defects_than_samples_are_refused():
    with pytest.raises(ValueError, match="3 defects in 2 samples"):
        defect_positions(ScenesConfig(num_samples=2, defects=DefectsConfig(missing=3)))


@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_server_serves_and_stops(tmp_path, place):
    folder = Folder.at(tmp_path)
    config = ScenesConfig(num_samples=12, defects=DEFECTS)
    draw(folder, config, start=0, stop=12)
    images = {key: members["png"] for key, members in read_samples(folder, "00000.images.tar")}
    if place == "remote":
        fsspec.filesystem("memory").put(str(tmp_path / "00000.images.tar"), "/served/00000.images.tar")
        folder = Folder.at("memory://served")
    with serve(folder) as address:
        assert address.startswith("http://127.0.0.1:")
        for row in rows_of(Folder.at(tmp_path)):
            if row["key"] in images:
                assert urllib.request.urlopen(address + row["url"]).read() == images[row["key"]]
            else:
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(address + row["url"])
        for path in ("images/00007/000000001.png", "00000.json", "images/../00000.json", "images/00000/x"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address + row["url"], timeout=2)


def test_a_taken_port_is_a_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OSError, match=rf"cannot serve .* port {port}.*source\.port"),
            serve(Folder.at(tmp_path), port),
        ):
            pass
