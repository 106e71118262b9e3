"""One writer a place, between real processes: who holds it is named, and whoever was killed holds nothing."""

import json
import os
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from holding import held_by

from repfusion.locks import Holder, locked

HOLD = """
import sys
from pathlib import Path
from repfusion.locks import locked
with locked(Path(sys.argv[1]), "", is_shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""
REMEDY = "go elsewhere"


def held(path: Path, kind: str = "alone") -> AbstractContextManager["subprocess.Popen[str]"]:
    """Another process has the lock for the length of the block."""
    return held_by(HOLD, str(path), kind)


def test_a_second_writer_is_told_who_is_at_work(tmp_path: Path):
    path = tmp_path / "place" / ".lock"
    with held(path) as process:
        message = (
            rf"place: another run is at work here: process {process.pid} on .* since 20.*; wait for it, or"
        )
        for is_shared in (False, True):
            with pytest.raises(ValueError, match=message) as error, locked(path, REMEDY, is_shared):
                pass
            assert str(error.value).endswith(f"or {REMEDY}")


def test_a_killed_process_holds_nothing_and_is_named_no_more(tmp_path: Path):
    path = tmp_path / ".lock"
    with held(path, "shared") as dead:
        dead.kill()
        dead.wait()
        with locked(path, REMEDY):
            (holder,) = [json.loads(line) for line in path.read_text().splitlines()]
            assert holder["pid"] == os.getpid()


def test_readers_share_and_keep_a_writer_out(tmp_path: Path):
    path = tmp_path / ".lock"
    with held(path, "shared") as one, held(path, "shared") as two:
        with locked(path, REMEDY, is_shared=True):
            pass
        with pytest.raises(ValueError, match=rf"process {one.pid} on .*process {two.pid} on"):
            with locked(path, REMEDY):
                pass


def test_a_lock_that_is_let_go_of_in_time_is_waited_for(tmp_path: Path):
    path = tmp_path / ".lock"
    with held(path) as process:
        assert process.stdin is not None
        process.stdin.close()
        with locked(path, REMEDY, wait_sec=30.0):
            pass


def test_a_lock_file_that_was_deleted_keeps_nobody_out_twice(tmp_path: Path):
    path = tmp_path / ".lock"
    with held(path):
        path.unlink()
        with locked(path, REMEDY), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            with locked(path, REMEDY):
                pass


def test_who_may_only_read_needs_no_lock_file(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    with locked(tmp_path / ".lock", REMEDY, is_shared=True):
        pass
    with pytest.raises(PermissionError), locked(tmp_path / ".lock", REMEDY):
        pass


def test_a_process_of_another_machine_is_not_taken_for_dead():
    here = Holder.here()
    assert not here.is_gone
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert here.model_copy(update={"pid": gone.pid}).is_gone
    assert not here.model_copy(update={"pid": gone.pid, "host": "elsewhere"}).is_gone


def test_a_process_that_nobody_waited_for_is_dead():
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert Holder.here().model_copy(update={"pid": ended.pid}).is_gone
    ended.wait()
