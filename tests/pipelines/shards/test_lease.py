"""One writer of a data location, on local disk and in a bucket, whichever machine it runs on: a second one is
told who has it, a dead one is found out, and of those who come at once one has it.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from holding import held_by

from pipelines.shards import lease
from pipelines.shards.lease import Lease, _Held
from pipelines.shards.storage import Folder
from pipelines.workflow.locks import kernel_lock, stage_lock
from repfusion.locks import JOB, Holder

HOLD = """
import json, sys
from pipelines.shards.lease import Lease
from pipelines.shards.storage import Folder
with Lease(Folder(sys.argv[1], json.loads(sys.argv[2])), beat_sec=float(sys.argv[3])):
    print("held", flush=True)
    sys.stdin.read()
"""
RACE = """
import json, sys, time
from pipelines.shards import lease
from pipelines.shards.storage import Folder
lease.SETTLE_SEC = 0.0
folder = Folder(sys.argv[1], json.loads(sys.argv[2]))
folder.parent.names()
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.Lease(folder, lambda text: None, beat_sec=1.0):
        print("won", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print("lost:", error, flush=True)
"""
BEAT_SEC = 0.1
PATIENT_SEC = 1.0
"""Of whoever comes second: a holder that starves beside other work is not taken for dead."""
ABROAD = Holder(
    host="elsewhere", pid=7, since="2026-11-27T10:00:00+00:00", command="pipelines run w.yaml", job="w-1"
)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """The folder of a stage that nobody holds."""
    return (
        Folder(str(tmp_path / "stage")) if request.param == "local" else request.getfixturevalue("s3_folder")
    )


def held(folder: Folder) -> AbstractContextManager["subprocess.Popen[str]"]:
    """Another process has the folder for the length of the block."""
    return held_by(HOLD, folder.url, json.dumps(dict(folder.options)), str(BEAT_SEC))


def files(folder: Folder) -> dict[str, Any]:
    """The lock files beside a folder, by number."""
    names = [name for name in folder.parent.names() if name.startswith(f".{folder.name}.")]
    return {name.split(".")[-2]: json.loads(folder.parent.read(name)) for name in names}


def leave(folder: Folder, number: int = 1, holder: Holder = ABROAD, beat: int = 3) -> str:
    """Writes what a holder that was killed on another machine leaves; returns the name of the file."""
    name = f".{folder.name}.{number}.lock"
    held = _Held(token=str(number), beat=beat, holder=holder)
    folder.parent.write(name, held.model_dump_json().encode())
    return name


def test_a_second_writer_ends_with_who_is_at_work_and_how_to_take_over(folder: Folder):
    said: list[str] = []
    with held(folder) as process:
        message = (
            rf"another run is at work here: process {process.pid} on .* since 20.*; wait for it, or end it "
            rf"\(kill {process.pid} on .*\) and run this again, which takes over what a dead one left after"
        )
        with pytest.raises(ValueError, match=message):
            with Lease(folder, said.append, PATIENT_SEC):
                pass
        assert [one["holder"]["pid"] for one in files(folder).values()] == [process.pid]
    assert len(said) == 1 and "looking whether that is alive" in said[0]


def test_a_job_is_named_and_how_it_is_cancelled(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(JOB, "demo-1")
    with Lease(folder, beat_sec=BEAT_SEC):
        monkeypatch.delenv(JOB)
        with pytest.raises(ValueError, match=r"job demo-1\); .*\(make cancel JOB=demo-1\)"):
            with Lease(folder, lambda text: None, PATIENT_SEC):
                pass


def test_a_killed_process_of_this_machine_is_dead_at_once(folder: Folder):
    said: list[str] = []
    with held(folder) as process:
        process.kill()  # and nobody waits for it: an entry without a process is dead too
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        with Lease(folder, said.append, beat_sec=20.0):
            assert f"process {process.pid} on" in said[0] and "is dead; its lock is taken over" in said[0]
            (mine,) = files(folder).values()
            assert not mine["is_free"]


def test_it_is_free_again_after_success_and_after_failure(folder: Folder):
    with Lease(folder, beat_sec=BEAT_SEC):
        pass
    with pytest.raises(RuntimeError, match="broken"), Lease(folder, beat_sec=BEAT_SEC):
        raise RuntimeError("broken")
    (last,) = files(folder).values()
    assert last["is_free"]
    with Lease(folder, pytest.fail, beat_sec=60.0):
        pass
    assert list(files(folder)) == ["3"]


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_one_of_another_machine_is_dead_when_it_renews_no_more_whatever_its_clock_says(
    folder: Folder, hours: int
):
    said: list[str] = []
    since = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    leave(folder, holder=ABROAD.model_copy(update={"since": since}))
    started = time.monotonic()
    with Lease(folder, said.append, BEAT_SEC):
        assert time.monotonic() - started >= 5 * BEAT_SEC
        assert list(files(folder)) == ["2"]
    assert ["looking" in said[0], "is dead" in said[1]] == [True, True]


def test_the_leases_of_a_dead_holder_lapse_together(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    places = [folder / name for name in ("a", "b", "c", "d")]
    for place in places:
        leave(place)
    sleep, beat_sec, waits = time.sleep, 4 * BEAT_SEC, list[float]()
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) or sleep(seconds))
    leases = [Lease(place, lambda text: None, beat_sec) for place in places]
    for one in leases:
        one.look()
    with ExitStack() as held:
        for one in leases:
            held.enter_context(one)
    # four looks in a beat, for five beats; not so many for each
    assert 1 <= waits.count(beat_sec / 4) <= 4 * 5 + len(places)


def test_who_renewed_since_it_was_looked_at_is_alive(folder: Folder):
    leave(folder)
    late = Lease(folder, lambda text: None, beat_sec=60.0)
    late.look()
    leave(folder, beat=4)
    with pytest.raises(ValueError, match="process 7 on elsewhere"), late:
        pass


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_one_of_another_machine_that_renews_is_alive_whatever_its_clock_says(folder: Folder, hours: int):
    since = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    holder = ABROAD.model_copy(update={"since": since})
    leave(folder, holder=holder)

    def renew(said: str) -> None:
        """While it is looked at."""
        leave(folder, holder=holder, beat=4)

    with pytest.raises(ValueError, match=r"process 7 on elsewhere .*job w-1"):
        with Lease(folder, renew, PATIENT_SEC):
            pass
    assert list(files(folder)) == ["1"]


@pytest.mark.parametrize("is_held", [False, True], ids=["free", "dead holder"])
def test_of_several_who_come_at_once_exactly_one_has_it(
    folder: Folder, is_held: bool, monkeypatch: pytest.MonkeyPatch
):
    """All have looked before the first creates its file, and each does so when the one before is done."""
    monkeypatch.setattr(lease, "SETTLE_SEC", 0.0)  # both stores let one alone create a file
    if is_held:
        leave(folder, number=9)
    looked, turn, waited = threading.Barrier(4), threading.Lock(), threading.local()
    create, take = Folder.create, Lease._take

    def create_in_turn(place: Folder, name: str, data: bytes) -> bool:
        if not hasattr(waited, "was"):
            waited.was = looked.wait(30)
            turn.acquire()
        return create(place, name, data)

    def take_in_turn(one: Lease) -> bool:
        is_first = not hasattr(waited, "was")
        try:
            return take(one)
        finally:
            if is_first:
                turn.release()

    monkeypatch.setattr(Folder, "create", create_in_turn)
    monkeypatch.setattr(Lease, "_take", take_in_turn)
    is_over, ends = threading.Event(), queue.SimpleQueue[str]()

    def come() -> None:
        try:
            with Lease(folder, lambda text: None, 4 * BEAT_SEC):
                ends.put("won")
                is_over.wait(30)
        except ValueError as error:
            ends.put(str(error))

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    found = [ends.get(timeout=30) for _ in threads]
    is_over.set()
    for thread in threads:
        thread.join()
    assert found.count("won") == 1
    assert all("another run is at work here" in one for one in found if one != "won")
    assert [one["is_free"] for one in files(folder).values()] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("is_held", [False, True], ids=["free", "dead holder"])
def test_of_several_processes_that_come_at_once_exactly_one_has_it(folder: Folder, is_held: bool):
    if is_held:
        leave(folder, number=9)
    command = [sys.executable, "-c", RACE, folder.url, json.dumps(dict(folder.options))]
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        for run in runs:
            assert run.stdout is not None and run.stdout.readline() == "ready\n"
        for run in runs:
            assert run.stdin is not None
            run.stdin.write("go\n")
            run.stdin.flush()
        first = [run.stdout.readline() for run in runs if run.stdout is not None]
        assert sorted(line.partition(":")[0].strip() for line in first) == ["lost", "lost", "lost", "won"]
        winner = runs[first.index("won\n")].pid
        assert all(f"process {winner} on" in line for line in first if line != "won\n")
    finally:
        for run in runs:
            run.communicate("end\n")
    assert [one["is_free"] for one in files(folder).values()] == [True]


def test_who_looked_long_ago_takes_no_number_below_the_highest(folder: Folder):
    """It found number 1 dead and slept; meanwhile others had 2 and 3, and have let go, or not."""
    leave(folder, number=3)
    late = Lease(folder, lambda text: None, BEAT_SEC)
    late._read = lambda: (1, None)  # what it saw
    assert not late._take()
    assert max(files(folder)) == "3"


def test_whoever_lost_it_stops(folder: Folder):
    """Its machine slept, say, and another took it for dead."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in processes of pytest-xdist
    try:
        _lose_while_asleep(folder, lambda: leave(folder, number=2))
    finally:
        signal.signal(signal.SIGINT, before)
    (last,) = (one for number, one in files(folder).items() if number == "2")
    assert last["token"] == "2" and not last["is_free"], "nobody frees what another has"


def _lose_while_asleep(folder: Folder, take: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"its lock went to process 7 on elsewhere .*; run it again"):
        with Lease(folder, beat_sec=BEAT_SEC):
            take()
            time.sleep(30)
    assert time.monotonic() - start < 15


def test_a_store_without_conditional_writes_has_one_holder_too():
    folder = Folder("memory://place/lease")
    with Lease(folder, beat_sec=BEAT_SEC):
        with pytest.raises(ValueError, match="another run is at work here"):
            with Lease(folder, lambda text: None, PATIENT_SEC):
                pass
    assert [one["is_free"] for one in files(folder).values()] == [True]


@pytest.mark.parametrize("data", [b"", b"{", b'{"token": 1}'])
def test_a_file_that_is_no_lease_is_named_and_not_waited_for(folder: Folder, data: bytes):
    folder.parent.write(f".{folder.name}.4.lock", data)
    with pytest.raises(ValueError, match=r"\.4\.lock: not a lock as a run writes it .*remove it"):
        with Lease(folder, beat_sec=BEAT_SEC):
            pass
    assert folder.parent.read(f".{folder.name}.4.lock") == data


def test_a_local_folder_has_both_locks_and_readers_hold_the_kernels_alone(tmp_path: Path):
    """A file system may keep the kernel's locks to one machine; the lease is seen from all."""
    folder = Folder(str(tmp_path / "stage"))
    with kernel_lock(folder, is_shared=True), kernel_lock(folder, is_shared=True):
        assert {path.name for path in tmp_path.iterdir()} == {".stage.lock"}
    (tmp_path / "link").symlink_to(tmp_path)
    with stage_lock(Folder(str(tmp_path / "link" / "stage"))):
        (name,) = {path.name for path in tmp_path.iterdir()} - {".stage.lock", "link"}
        assert name == ".stage.1.lock" and not files(folder)["1"]["is_free"]
    assert files(folder)["1"]["is_free"]


def test_a_bucket_that_is_not_there_is_named(s3_options: dict[str, Any]):
    folder = Folder("s3://nowhere/data/ingest", s3_options)
    with pytest.raises(
        ValueError, match=r"s3://nowhere/data/ingest: its lock .* see that the bucket or folder"
    ):
        Lease(folder).__enter__()


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_place_that_may_not_be_written_is_named(
    store: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    if store == "s3":
        from s3fs import S3FileSystem

        async def refused(*_: Any, **__: Any) -> None:
            raise PermissionError("Access Denied")

        folder = request.getfixturevalue("s3_folder")
        monkeypatch.setattr(S3FileSystem, "_pipe_file", refused)
        request.addfinalizer(S3FileSystem.clear_instance_cache)
        S3FileSystem.clear_instance_cache()
    else:
        (tmp_path / "file").touch()
        folder = Folder(str(tmp_path / "file" / "ingest"))
    with pytest.raises(ValueError, match=rf"{folder.url}: its lock cannot be written \(\w+Error: "):
        Lease(folder).__enter__()
