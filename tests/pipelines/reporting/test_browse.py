"""Pages of pictures: every sample with its captions, every drop with its picture and reason; searched, and
served to this machine alone.
"""

import re
import urllib.error
import urllib.request
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import IN_A_BROWSER, in_browser
from tiny_shards import write_shards

from pipelines.browse import server_of
from pipelines.reporting.browse import Library, Shelf
from pipelines.shards.storage import Folder


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    """Ten pictures in two shards; `curate` dropped one that repeats another, and one that is no picture."""
    root = tmp_path_factory.mktemp("browsed")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(10)]
    for stage in ("ingest", "curate"):
        write_shards(root / stage, images, 2)
    rows = [
        ("000000001", "duplicate_image", "duplicate of 000000000"),
        ("000009999", "undecodable", "<b>bad</b>"),
    ]
    names = ["key", "reason", "detail"]
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=names)
    pq.write_table(table, root / "curate" / "00000.drops.parquet")
    ingest, curate = (Folder(str(root / stage)) for stage in ("ingest", "curate"))
    return Library("mine", {"ingest": Shelf(ingest, None), "curate": Shelf(curate, ingest)})


def page(library: Library, address: str) -> str:
    answer = library.answer(address)
    assert answer.status == 200 and answer.kind.startswith("text/html")
    return answer.body.decode()


def test_the_first_page_leads_to_every_stage(library):
    first = page(library, "/")
    assert re.findall(r'<a href="(/\w+/\d+)">', first) == ["/ingest/00000", "/curate/00000"]


def test_a_shard_shows_its_samples_and_what_it_dropped(library):
    shown = page(library, "/curate/00000")
    samples, dropped = shown.split("<h2>2 dropped</h2>")
    assert samples.count("<img ") == 5 and "dog 000000003" in samples
    assert 'src="/curate/00000/000000003"' in samples and '<a href="/curate/00001">shard after</a>' in samples
    places = [dropped.index(text) for text in ("000000001", "duplicate of 000000000", 'alt="000000000"')]
    assert places == sorted(places), "the duplicate, and then what it repeats"
    assert dropped.count('src="/ingest/00000/') == 2 and "no picture" in dropped
    assert "&lt;b&gt;bad&lt;/b&gt;" in dropped and "<b>bad" not in dropped
    assert '<meta name="viewport"' in shown and "http" not in re.sub("https?://127[^ ]*", "", samples)


def test_a_search_goes_over_the_shards(library):
    found = page(library, "/curate/00000?q=DOG%20000010002")
    assert found.count("<img ") == 1 and "000010002" in found and "1 of 2 shards hold these words." in found
    nothing = page(library, "/curate/00000?q=%3Cscript%3E")
    assert "<img " not in nothing and "<script>" not in nothing


def test_a_picture_is_the_one_that_is_stored(library):
    answer = library.answer("/curate/00001/000010000")
    assert answer.kind == "image/png" and answer.body.startswith(b"\x89PNG")


@pytest.mark.parametrize("address", ["/no", "/no/00000", "/curate/00009", "/curate/00000/nobody", "/a/b/c/d"])
def test_what_is_not_there_is_404(library, address):
    assert library.answer(address).status == 404


def test_the_server_answers_this_machine_alone(library):
    server = server_of(library, 0)
    assert server.server_address[0] == "127.0.0.1"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        place = f"http://127.0.0.1:{server.server_port}/curate/00000"
        assert b"dog 000000003" in urllib.request.urlopen(place).read()
        foreign = urllib.request.Request(place, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
@IN_A_BROWSER
@pytest.mark.parametrize("address", ["/", "/curate/00001"])
def test_no_page_is_wider_than_a_phone(library, address, tmp_path):
    page = tmp_path / "page.html"
    page.write_bytes(library.answer(address).body)
    measured = "said.push(document.documentElement.scrollWidth <= window.innerWidth, window.innerWidth)"
    assert in_browser(page, measured, width=390) == [True, 390]
