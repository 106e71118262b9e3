"""Copies of what lies behind URLs: one download a node, the right version, a bound that holds, and nothing
removed under a process that uses it. Each process of the node is a real one.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from repfusion.config import Config, WeightsFolder, weights_of
from repfusion.weights import WEIGHTS, cached, url_of

PROCESS = """
import sys
from pathlib import Path
from repfusion.pretrained import cache
from repfusion.weights import cached
download = cache._download
def told(*arguments):
    print("downloads", flush=True)
    if "killed" in sys.argv[2:]:
        arguments[0].get_file = lambda *_: sys.exit("killed")
    download(*arguments)
cache._download = told
try:
    cache.fetch([cached(sys.argv[1])])
    print("has it", flush=True)
except ValueError as error:
    sys.exit(f"error: {error}")
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., str]:
    """Puts a file of some size into a folder of a store; the folder's URL."""

    def put(name: str, size: int = 1000, content: bytes = b"x") -> str:
        path = tmp_path / "store" / name / "nested" / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content * size)
        return f"file://{tmp_path}/store/{name}"

    return put


def start(url: str, *words: str) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROCESS, url, *words], text=True, **pipes)


def said(process: "subprocess.Popen[str]") -> list[str]:
    """What a process said until it ended, which it does now."""
    out, error = process.communicate(timeout=600)
    return [*out.splitlines(), *error.splitlines()[-1:]]


@contextmanager
def using(url: str) -> Iterator[None]:
    """Another process that uses a copy for the length of the block."""
    process = start(url)
    assert process.stdout is not None
    while process.stdout.readline() != "has it\n":
        assert process.poll() is None
    try:
        yield
    finally:
        process.communicate()


def content(url: str) -> bytes:
    return (cached(url) / "nested/model.safetensors").read_bytes()


def test_the_place_of_a_copy_says_what_it_is_a_copy_of(cache: Path):
    place = cached("s3://bucket/models/llava/")
    assert place == cache / "s3%3A%2F%2Fbucket%2Fmodels" / "llava"
    assert url_of(place) == "s3://bucket/models/llava"
    assert url_of(WEIGHTS / "llava") is None and url_of(place / "deeper") is None


class Section(Config):
    mllm: WeightsFolder
    other: WeightsFolder | None = None


def test_a_configuration_has_the_copy_and_is_written_with_the_url():
    section = Section.model_validate({"mllm": "s3://bucket/llava", "other": "/models/here"})
    assert weights_of(section) == {"mllm": cached("s3://bucket/llava"), "other": Path("/models/here")}
    written = section.model_dump(mode="json")
    assert written == {"mllm": "s3://bucket/llava", "other": "/models/here"}
    assert (
        Section.model_validate(written) == section == Section.model_validate_json(section.model_dump_json())
    )
    assert Section(mllm=Path("a")).model_dump(mode="json") == {"mllm": "a", "other": None}


def test_of_two_processes_one_downloads(publish: Callable[..., str]):
    url = publish("llava")
    both = [start(url), start(url)]
    lines = sorted(line for process in both for line in said(process))
    assert lines == ["downloads", "has it", "has it"] and content(url) == b"x" * 1000
    assert said(start(url)) == ["has it"]


@pytest.mark.slow
def test_another_version_is_fetched_anew_and_one_that_was_cut_short_too(publish: Callable[..., str]):
    url = publish("llava")
    assert said(start(url, "killed")) == ["downloads", "killed"]
    assert not cached(url).exists()
    assert said(start(url)) == ["downloads", "has it"]
    publish("llava", 999, b"y")
    assert said(start(url)) == ["downloads", "has it"] and content(url) == b"y" * 999


@pytest.mark.slow
def test_the_least_recently_used_goes_where_there_is_no_room(
    publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REPFUSION_CACHE_GIB", str(2500 / 2**30))
    one, two, three, four = map(publish, ("one", "two", "three", "four"))
    for url in (one, two, one):
        said(start(url))
    said(start(three))
    assert [cached(url).exists() for url in (one, two, three)] == [True, False, True]
    with using(one):
        said(start(four))
        assert [cached(url).exists() for url in (one, three, four)] == [True, False, True]
        large = publish("large", 1600)
        (error,) = said(start(large))
        assert "file://" in error and "1,600 bytes do not fit" in error and "REPFUSION_CACHE_GIB" in error
    assert said(start(large)) == ["downloads", "has it"]
    assert sum(path.stat().st_size for path in cached(one).parent.rglob("*.safetensors")) <= 2500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "message"),
    [("file:///nowhere/llava", "there is nothing"), ("nosuch://a/b", "Protocol not known: nosuch")],
)
def test_a_url_that_leads_nowhere_is_an_error(url: str, message: str):
    (error,) = said(start(url))
    assert error.startswith(f"error: {url}: ") and message in error


@pytest.mark.slow
def test_without_a_bound_nothing_is_removed(publish: Callable[..., str]):
    assert "REPFUSION_CACHE_GIB" not in os.environ
    urls = [publish(name) for name in ("one", "two")]
    for url in urls:
        said(start(url))
    assert all(cached(url).exists() for url in urls)
