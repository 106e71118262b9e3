"""Downloads that fail at first, from a real server: `retry` asks for those alone, and the data ends up as if
nothing had failed.
"""

import csv
import time
from collections import Counter
from pathlib import Path

import pytest
from hostile_server import Handler, Server, hangs, picture, running, shows
from running import DATA_STAGES, data_files, found, manifests, run_all, shard_times, statuses

from pipelines.build import data_stages
from pipelines.workflow.retry import retry

pytestmark = pytest.mark.ray
NUM_SAMPLES, SHARD_SIZE = 32, 8
BUSY = (3, 5, 17)
"""Positions that are answered with 503 at first, in shards 0 and 2."""
SLOW = 18
GONE = 30


def busy(handler: Handler) -> None:
    handler.reply(b"busy", 503)


def write_list(path: Path, address: str, captions: str = "a red circle") -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["url", "caption"])
        writer.writerows([f"{address}{index}.png", f"{captions} {index}"] for index in range(NUM_SAMPLES))


@pytest.fixture
def server():
    with running() as server:
        heal(server)
        yield server


def heal(server: Server) -> None:
    server.pages = {f"{i}.png": shows(picture(i)) for i in range(NUM_SAMPLES) if i != GONE}


def fall_ill(server: Server) -> None:
    server.pages |= {f"{i}.png": busy for i in BUSY} | {f"{SLOW}.png": hangs}


@pytest.fixture
def make_workflow(configure, tmp_path, server):
    """A workflow over the server's list; captions are those of tiny models, so they fit."""
    path = tmp_path / "list.csv"
    write_list(path, server.address)

    def make(root: str):
        return configure(
            tmp_path / root,
            source={"kind": "urls", "path": str(path), "shard_size": SHARD_SIZE},
            ingest={"allow_private_addresses": True, "retries": 0, "timeout_sec": 1},
        )

    return make


def shard_of(position: int) -> str:
    return f"{position // SHARD_SIZE:05d}"


def test_only_what_failed_is_asked_for_again(pool, make_workflow, server):
    sound, ill = make_workflow("sound"), make_workflow("ill")
    run_all(sound, pool)
    fall_ill(server)
    results, _ = run_all(ill, pool)
    assert manifests(results)["ingest"].drops == {"http_404": 1, "http_503": 3, "timeout": 1}
    assert manifests(results)["prompt_features"].samples == NUM_SAMPLES - 5
    before = shard_times(ill.root)

    heal(server)
    server.requests.clear()
    said: list[str] = []
    assert retry(data_stages(ill), ill.root, ill.ray, None, said.append, pool) == 4
    assert said[0] == "retrying 4 samples in 2 shards: http_503 3, timeout 1"
    assert said[-1] == "regained 4 of 4 samples"
    assert server.requests == Counter(f"{index}.png" for index in (*BUSY, SLOW))
    assert data_files(ill.data_folder) == data_files(sound.data_folder)
    after = shard_times(ill.root)
    again = {name.partition(".")[0] for name in after if after[name] != before[name]}
    shards = {shard_of(index) for index in (*BUSY, SLOW)}
    expected = {f"{stage}/{shard}" for stage in DATA_STAGES[1:] for shard in shards}
    # the list of duplicates is made again and is the same: the other shards of curate stay
    assert again == expected | {"judge/duplicates", "image_features/statistics"}
    assert set(statuses(ill).values()) == {"fresh"}

    said.clear()
    server.requests.clear()
    assert retry(data_stages(ill), ill.root, ill.ray, None, said.append, pool) == 0
    assert said == ["nothing to retry; ingest dropped: http_404 1"] and not server.requests


@pytest.mark.slow
def test_what_still_fails_stays_a_drop_and_reasons_can_be_chosen(pool, make_workflow, server):
    config = make_workflow("run")
    fall_ill(server)
    run_all(config, pool)
    before = data_files(config.data_folder)

    server.requests.clear()
    assert retry(data_stages(config), config.root, config.ray, ["http_503"], lambda line: None, pool) == 0
    assert server.requests == Counter(f"{index}.png" for index in BUSY)
    assert data_files(config.data_folder) == before
    assert set(statuses(config).values()) == {"fresh"}

    heal(server)
    server.pages[f"{GONE}.png"] = shows(picture(GONE))
    server.requests.clear()
    assert retry(data_stages(config), config.root, config.ray, ["http_404"], lambda line: None, pool) == 1
    assert server.requests == Counter([f"{GONE}.png"])
    assert found(config)["ingest"].output.manifest.drops == {"http_503": 3, "timeout": 1}


def test_retry_wants_a_complete_ingest(pool, make_workflow):
    config = make_workflow("run")
    with pytest.raises(ValueError, match="ingest is not complete; 'run' goes on"):
        retry(data_stages(config), config.root, config.ray, None, print, pool)


@pytest.mark.slow
def test_another_list_makes_everything_stale_the_same_list_elsewhere_nothing(
    pool, make_workflow, configure, tmp_path, server
):
    config = make_workflow("run")
    run_all(config, pool)
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_bytes((tmp_path / "list.csv").read_bytes())
    moved = config.model_copy(update={"source": config.source.model_copy(update={"path": str(elsewhere)})})
    assert set(statuses(moved).values()) == {"fresh"}
    time.sleep(0.01)
    write_list(tmp_path / "list.csv", server.address, "a blue square")
    states = found(config)
    assert {state.status for state in states.values()} == {"stale"}
    for state in states.values():
        assert state.reason.startswith("source.path ") and " -> " in state.reason
