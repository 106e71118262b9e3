"""One writer of a folder in a bucket: a second one is told who has it, a dead one is found out."""

import json
import signal
import subprocess
import time
from contextlib import AbstractContextManager

import pytest
from holding import held_by

from pipelines.shards.lease import Lease
from pipelines.shards.storage import Folder

HOLD = """
import json, sys
from pipelines.shards.lease import Lease
from pipelines.shards.storage import Folder
with Lease(Folder(sys.argv[1], json.loads(sys.argv[2])), beat_sec=0.1):
    print("held", flush=True)
    sys.stdin.read()
"""
BEAT_SEC = 0.1


def held(folder: Folder) -> AbstractContextManager["subprocess.Popen[str]"]:
    """Another process has the folder for the length of the block."""
    return held_by(HOLD, folder.url, json.dumps(dict(folder.options)))


def has_lease(folder: Folder) -> bool:
    return folder.parent.has(f".{folder.name}.lock.json")


def write_lease(folder: Folder, data: bytes) -> None:
    folder.parent.write(f".{folder.name}.lock.json", data)


def test_a_second_writer_ends_with_who_is_at_work(s3_folder: Folder):
    said: list[str] = []
    with held(s3_folder) as process:
        with pytest.raises(ValueError, match=rf"another run is at work here: process {process.pid} on"):
            with Lease(s3_folder, said.append, BEAT_SEC):
                pass
    assert len(said) == 1 and "looking whether that is alive" in said[0]


def test_a_killed_process_of_this_machine_is_dead_at_once(s3_folder: Folder):
    said: list[str] = []
    with held(s3_folder) as process:
        process.kill()
        process.wait()
        assert has_lease(s3_folder)
        with Lease(s3_folder, said.append, beat_sec=20.0):
            assert f"process {process.pid} on" in said[0] and "is dead" in said[0]
    assert not has_lease(s3_folder)


def test_one_of_another_machine_is_dead_when_it_renews_no_more(s3_folder: Folder):
    said: list[str] = []
    abroad = Lease(s3_folder, beat_sec=BEAT_SEC)._bytes().replace(b'"host":"', b'"host":"not-')
    write_lease(s3_folder, abroad)
    started = time.monotonic()
    with Lease(s3_folder, said.append, BEAT_SEC):
        assert time.monotonic() - started >= 5 * BEAT_SEC
    assert ["looking" in said[0], "is dead" in said[1]] == [True, True]


def test_whoever_lost_it_stops(s3_folder: Folder):
    """Its machine slept, say, and another took it for dead."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes of pytest-xdist
    try:
        _lose_while_asleep(s3_folder)
    finally:
        signal.signal(signal.SIGINT, before)


def _lose_while_asleep(s3_folder: Folder) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"its lock went to process .*; run it again"):
        with Lease(s3_folder, beat_sec=BEAT_SEC) as lease:
            other = Lease(s3_folder)
            write_lease(s3_folder, other._bytes())
            time.sleep(30)
    assert time.monotonic() - start < 15
    assert lease.token.encode() not in s3_folder.parent.read(lease.name)


def test_a_store_without_conditional_writes_has_one_holder_too():
    folder = Folder("memory://place/lease")
    with Lease(folder, beat_sec=BEAT_SEC):
        with pytest.raises(ValueError, match="another run is at work here"):
            with Lease(folder, lambda text: None, BEAT_SEC):
                pass
    assert not has_lease(folder)


@pytest.mark.parametrize("data", [b"", b"{", b'{"token": 1}'])
def test_an_object_that_is_no_lease_is_named_and_not_waited_for(s3_folder, data):
    folder = s3_folder / "stage"
    folder.parent.write(".stage.lock.json", data)
    with pytest.raises(ValueError, match=r"\.stage\.lock\.json: not a lock as a run writes it .*remove it"):
        with Lease(folder, beat_sec=BEAT_SEC):
            pass
    assert folder.parent.read(".stage.lock.json") == data
