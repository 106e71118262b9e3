"""Downloads into shards: each row accounted for, the same bytes however they came."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import (
    Server,
    drips,
    hangs,
    is_cut_short,
    never_ends,
    picture,
    recovers,
    redirects,
    running,
    shows,
)
from PIL import Image

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources.ingest import (
    ImageFitter,
    IngestConfig,
    IngestWorker,
    drop_reason,
    fingerprint_fields,
)
from repfusion.images.limits import BadImage

JOB = ShardJob("00000", "f", {"source": "s"})
AS_IT_IS = IngestConfig(image_size=None)


@pytest.fixture
def server():
    with running() as server:
        yield server


def local(**fields) -> IngestConfig:
    """Loopback allowed, nothing waited for."""
    fields = {"retries": 0, "retry_backoff_sec": 0.01, "max_drop_fraction": 1.0} | fields
    return IngestConfig(allow_private_addresses=True, **fields)


def write_list(folder: Path, urls: list[str], name: str = "00000", **columns: list) -> None:
    folder.mkdir(exist_ok=True)
    keys = [f"{3 * i:09d}" for i in range(len(urls))]
    rows = {"key": keys, "url": urls, "caption": [f"thing {i}" for i in range(len(urls))], **columns}
    pq.write_table(pa.table(rows), folder / f"{name}.parquet")


def worker(tmp_path: Path, server: Server, out: str = "out", **fields) -> IngestWorker:
    return IngestWorker(
        Folder.at(tmp_path / out), Folder.at(tmp_path / "lists"), local(**fields), server.address
    )


def drops_of(folder: Folder) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(folder.path / "00000.drops.parquet").to_pylist()
    return {row["key"]: (row["reason"], row["detail"]) for row in rows}


def contents(folder: Folder) -> dict[str, bytes]:
    """Every data file; the sidecar tells the seconds that it took."""
    return {name: folder.read(name) for name in folder.names() if not name.endswith(".json")}


def test_addresses_of_any_letters_are_asked_for_and_stored_as_given(tmp_path, server):
    """And a value that JSON does not have is null, at any depth."""
    urls = ["a b.png", " é/ü.png?q=ß ", "%C3%A9%20x.png", f"{server.address}a b.png"]
    server.pages |= {
        "a%20b.png": shows(picture(0)),
        "%C3%A9/%C3%BC.png?q=%C3%9F": shows(picture(1)),
        "%C3%A9%20x.png": shows(picture(2)),
    }
    write_list(tmp_path / "lists", urls, scores=[[0.5, float("nan")]] * 4)
    one = worker(tmp_path, server)
    sidecar = one(JOB)
    assert sidecar.samples == 4 and not sidecar.drops
    records = [json.loads(members["json"]) for _, members in read_samples(one.folder, "00000.tar", sidecar)]
    assert [record["url"] for record in records] == urls
    assert [record["scores"] for record in records] == [[0.5, None]] * 4


def test_each_row_is_a_sample_or_a_counted_drop(tmp_path, server):
    server.pages |= {
        "small": shows(picture(0)),
        "large": shows(picture(1, (90, 64), "JPEG")),
        "moved": redirects(f"{server.address}small"),
        "text": shows(b"no image"),
        "cut": shows(picture(2)[:-60]),
        "short": is_cut_short(picture(3)),
        "hangs": hangs,
        "drips": drips,
        "endless": never_ends,
        "bomb": shows(picture(4, (300, 300))),
        "line": shows(picture(5, (6000, 1))),
        "noai": shows(picture(6), X_Robots_Tag="noai"),
        "busy": recovers(b"", 99),
    }
    reasons = {
        "small": None,
        "large": None,
        "moved": None,
        "text": "undecodable_image",
        "cut": "undecodable_image",
        "short": "incomplete_read",
        "hangs": "timeout",
        "drips": "timeout",
        "endless": "too_many_bytes",
        "bomb": "too_many_pixels",
        "line": "too_many_pixels",
        "noai": "robots_disallowed",
        "busy": "http_503",
        "none": "http_404",
        "ftp://127.0.0.1/a": "unsupported_scheme",
        "http://127.0.0.1:1/": "connection_error",
        "mailto:someone": "unsupported_scheme",
        "http://[": "invalid_url",
        "http://a b/": "invalid_url",
        "": "http_404",
    }
    write_list(tmp_path / "lists", list(reasons))
    one = worker(tmp_path, server, timeout_sec=1, max_download_bytes=60_000, max_pixels=80_000)
    sidecar = one(JOB)
    expected = {f"{3 * i:09d}": reason for i, reason in enumerate(reasons.values())}
    found = {key: reason for key, (reason, _) in drops_of(one.folder).items()}
    assert found == {key: reason for key, reason in expected.items() if reason}
    samples = dict(read_samples(one.folder, "00000.tar", sidecar))
    assert list(samples) == [key for key, reason in expected.items() if not reason]
    assert sidecar.samples + sum(sidecar.drops.values()) == len(reasons)
    # nothing in the data names the port that happened to serve it
    port = str(server.server_address[1])
    assert not any(port in detail for _, detail in drops_of(one.folder).values())
    assert samples["000000003"]["txt"] == b"thing 1"
    assert json.loads(samples["000000003"]["json"]) == {
        "key": "000000003",
        "url": "large",
        "width": 64,
        "height": 64,
        "original_width": 90,
        "original_height": 64,
    }
    assert Image.open(io.BytesIO(samples["000000003"]["png"])).size == (64, 64)


def test_the_internet_is_the_default(tmp_path, server):
    server.pages["a"] = shows(picture())
    write_list(tmp_path / "lists", [f"{server.address}a", "b"])
    config = IngestConfig(max_drop_fraction=1)
    one = IngestWorker(Folder.at(tmp_path / "out"), Folder.at(tmp_path / "lists"), config)
    assert one(JOB).drops == {"invalid_url": 1, "private_address": 1}
    assert not server.requests


def test_further_columns_go_into_the_json(tmp_path, server):
    server.pages["a"] = shows(picture())
    write_list(tmp_path / "lists", ["a"], long=["a long thing"], score=[0.5], tags=[["x"]])
    one = worker(tmp_path, server)
    [(_, members)] = read_samples(one.folder, "00000.tar", one(JOB))
    metadata = json.loads(members["json"])
    assert (metadata["long"], metadata["score"], metadata["tags"]) == ("a long thing", 0.5, ["x"])


def test_an_outage_fails_the_shard_instead_of_dropping_it_all(tmp_path, server):
    write_list(tmp_path / "lists", ["a.png", "b.png"])
    with pytest.raises(ShardError, match=r"2 of 2 samples dropped.*http_404 2"):
        worker(tmp_path, server, max_drop_fraction=0.5)(JOB)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_busy_server_is_asked_again_a_clear_answer_is_not(tmp_path, server):
    server.pages["a"] = recovers(picture(), 2)
    write_list(tmp_path / "lists", ["a", "none"])
    sidecar = worker(tmp_path, server, retries=2)(JOB)
    assert (sidecar.samples, sidecar.drops) == (1, {"http_404": 1})
    assert server.requests == {"a": 3, "none": 1}


def test_the_same_bytes_whatever_the_threads_and_the_order_of_arrival(tmp_path, server):
    def late(seed: int):
        def page(handler):
            time.sleep(0.1 if seed % 3 == 0 else 0)
            handler.reply(picture(seed))

        return page

    for shard in range(4):
        names = [f"{shard}/{i}" for i in range(12)]
        server.pages |= {name: late(12 * shard + i) for i, name in enumerate(names[:-1])}
        write_list(tmp_path / "lists", names, f"{shard:05d}")
    jobs = [ShardJob(f"{shard:05d}", "f") for shard in range(4)]
    one, two = worker(tmp_path, server, "one", num_threads=1), worker(tmp_path, server, "two")
    output = os.fstat(1)
    hashes = [one(job).sha256 for job in jobs]
    with ThreadPoolExecutor(two.concurrency) as threads:
        assert [sidecar.sha256 for sidecar in threads.map(two, reversed(jobs))] == hashes[::-1]
    assert contents(one.folder) == contents(two.folder)
    # the Resizer points the process's output elsewhere for a while
    assert os.path.samestat(output, os.fstat(1))


def make_flaky(tmp_path: Path, server: Server, out: str) -> tuple[IngestWorker, Sidecar]:
    """Ten rows: 1, 4 and 8 fail at first, 2 for good and 5 is text."""
    names = [f"{out}/{i}" for i in range(10)]
    server.pages |= {name: shows(picture(i)) for i, name in enumerate(names) if i != 2}
    server.pages[f"{out}/5"] = shows(b"text")
    healthy = dict(server.pages)
    server.pages |= {f"{out}/{i}": recovers(b"", 99) for i in (1, 4)}
    server.pages[f"{out}/8"] = hangs
    write_list(tmp_path / "lists", [str(i) for i in range(10)])
    one = worker(tmp_path, server, out, timeout_sec=1)
    one.base_url += f"{out}/"
    sidecar = one(JOB)
    server.pages |= healthy
    return one, sidecar


def test_only_failed_samples_are_tried_again(tmp_path, server):
    one, before = make_flaky(tmp_path, server, "a")
    assert before.drops == {"http_404": 1, "http_503": 2, "timeout": 1, "undecodable_image": 1}
    server.requests.clear()
    half = one(ShardJob("00000", "f", {"source": "s"}, {"retry": ["http_503"]}))
    assert half.drops == {"http_404": 1, "timeout": 1, "undecodable_image": 1} and half.samples == 7
    assert server.requests == {"a/1": 1, "a/4": 1}
    server.requests.clear()
    whole = one(ShardJob("00000", "f", {"source": "s"}, {"retry": ["http_503", "timeout", "http_404"]}))
    assert server.requests == {"a/2": 1, "a/8": 1}
    assert whole.drops == {"http_404": 1, "undecodable_image": 1}
    smooth = worker(tmp_path, server, "smooth")
    smooth.base_url += "a/"
    smooth(JOB)
    assert contents(one.folder) == contents(smooth.folder)
    assert whole.model_dump(exclude={"seconds"}) == smooth(JOB).model_dump(exclude={"seconds"})


def test_nothing_to_try_again_asks_nobody_and_changes_nothing(tmp_path, server):
    one, before = make_flaky(tmp_path, server, "a")
    server.requests.clear()
    assert one(ShardJob("00000", "f", {"source": "s"}, {"retry": ["dns_failure"]})) == before
    assert not server.requests


@pytest.mark.parametrize("damage", ["flip", "cut", "drops", "no sidecar", "other input", "other list"])
def test_without_a_sound_shard_the_whole_is_made(tmp_path, server, damage):
    one, before = make_flaky(tmp_path, server, "a")
    folder, path = one.folder.path, one.folder.path / "00000.tar"
    inputs = {"source": "s"}
    match damage:
        case "flip":
            data = bytearray(path.read_bytes())
            data[700] ^= 1
            path.write_bytes(data)
        case "cut":
            path.write_bytes(path.read_bytes()[:-512])
        case "drops":
            (folder / "00000.drops.parquet").unlink()
        case "no sidecar":
            (folder / "00000.json").unlink()
        case "other input":
            inputs = {"source": "t"}
        case "other list":
            write_list(tmp_path / "lists", [str(i) for i in range(9)])
    server.requests.clear()
    sidecar = one(ShardJob("00000", "f", inputs, {"retry": ["http_503"]}))
    rows = 9 if damage == "other list" else 10
    assert len(server.requests) == rows and sidecar.samples == rows - 2
    assert len(dict(read_samples(one.folder, "00000.tar", sidecar))) == sidecar.samples != before.samples


def test_a_killed_worker_leaves_nothing(tmp_path, server):
    server.pages |= {"a": shows(picture()), "b": hangs}
    write_list(tmp_path / "lists", ["a", "b"])
    code = (
        "import sys\n"
        "from pipelines.sources.ingest import IngestConfig, IngestWorker\n"
        "from pipelines.runtime.pool import ShardJob\n"
        "from pipelines.shards.storage import Folder\n"
        "config = IngestConfig(allow_private_addresses=True, timeout_sec=60)\n"
        "worker = IngestWorker(Folder(sys.argv[1]), Folder(sys.argv[2]), config, sys.argv[3])\n"
        "worker(ShardJob('00000', 'f'))\n"
    )
    out = Folder.at(tmp_path / "out")
    command = [sys.executable, "-c", code, out.url, str(tmp_path / "lists"), server.address]
    with subprocess.Popen(command) as process:
        while server.requests.total() < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert out.names() == set()
    out.remove_temporaries()
    assert list(out.path.iterdir()) == []
    server.pages["b"] = shows(picture(1))
    assert worker(tmp_path, server)(JOB).samples == 2


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("failed_to_download", "[http_404] Not Found", ("http_404", "Not Found")),
        (
            "failed_to_resize",
            "[undecodable_image] no known\nformat",
            ("undecodable_image", "no known\nformat"),
        ),
        ("failed_to_download", "unknown url type: 'a'", ("invalid_url", "no scheme")),
        ("failed_to_download", "something else", ("failed_to_download", "something else")),
    ],
)
def test_reasons(status, message, reason):
    assert drop_reason(status, message) == reason


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ("center_crop", (16, 16)),
        ("border", (16, 16)),
        ("keep_ratio", (32, 16)),
        ("keep_ratio_largest", (16, 8)),
    ],
)
def test_sizes(resize, size):
    image, sizes = ImageFitter(IngestConfig(image_size=16, resize=resize))(picture(0, (80, 40)))
    assert Image.open(io.BytesIO(image)).size == size == (sizes["width"], sizes["height"])
    assert (sizes["original_width"], sizes["original_height"]) == (80, 40)
    if resize == "border":
        assert Image.open(io.BytesIO(image)).getpixel((8, 0)) == (255, 255, 255)


def test_what_follows_the_end_of_a_picture_does_no_harm():
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture(3, (40, 40), kind)
        assert ImageFitter(AS_IT_IS)(data + b"\xff\xda trailing") == ImageFitter(AS_IT_IS)(data)


def test_what_would_grow_too_large_is_refused_before_it_is_decoded():
    start = time.perf_counter()
    # a line of pixels, brought to a height of 400
    with pytest.raises(BadImage, match=r"5000 x 1, scaled to 800,000,000 pixels"):
        ImageFitter(IngestConfig(image_size=400, resize="keep_ratio"))(picture(0, (5000, 1)))
    assert time.perf_counter() - start < 1
    ImageFitter(IngestConfig(image_size=400, resize="border"))(picture(0, (5000, 1)))
    with pytest.raises(BadImage, match="max_pixels 99"):
        ImageFitter(IngestConfig(image_size=None, max_pixels=99))(picture(0, (10, 10)))
    ImageFitter(IngestConfig(image_size=None, max_pixels=100))(picture(0, (10, 10)))


def test_a_quality_that_png_does_not_have():
    with pytest.raises(ValueError, match="quality 95 with encode png"):
        IngestConfig(quality=95)


def test_what_decides_the_bytes():
    base = fingerprint_fields(IngestConfig())
    for fields in ({"num_threads": 3}, {"retries": 5}, {"timeout_sec": 3}, {"max_drop_fraction": 0.1}):
        assert fingerprint_fields(IngestConfig(**fields)) == base
    for fields in ({"image_size": 32}, {"max_pixels": 5}, {"max_download_bytes": 5}, {"encode": "webp"}):
        assert fingerprint_fields(IngestConfig(**fields)) != base


def test_a_silent_server_of_the_driver_costs_no_sample(tmp_path, server):
    server.pages |= {"a": shows(picture(0)), "b": recovers(picture(1), 9)}
    write_list(tmp_path / "lists", ["a", "b", "none"])
    one = worker(tmp_path, server, retries=0)
    one.own_server = True
    with pytest.raises(ConnectionError, match=r"did not deliver 1 images, first 000000003: Service"):
        one(ShardJob("00000", "f"))
    assert one.folder.names() == set()
    server.pages["b"] = shows(picture(1))
    assert one(ShardJob("00000", "f")).drops == {"http_404": 1}
