"""What the tests start does not outlive them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGUSR1, pthread_kill, signal
from threading import Thread, main_thread

import pytest
from programs import outputs, torchrun

SLEEPER = "import os, sys, time; open(sys.argv[1] + str(os.getpid()), 'w').close(); time.sleep(600)"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class NoLongerWaitedFor(Exception):
    pass


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_ranks_that_are_no_longer_waited_for_are_ended(tmp_path: Path):
    script, seen = tmp_path / "sleeper.py", tmp_path / "seen"
    script.write_text(SLEEPER)
    seen.mkdir()

    def interrupt(*_: object) -> None:
        raise NoLongerWaitedFor

    def interrupt_when_both_sleep() -> None:
        while len(list(seen.iterdir())) < 2:
            time.sleep(0.1)
        pthread_kill(main_thread().ident, SIGUSR1)

    before = signal(SIGUSR1, interrupt)  # processes of xdist ignore SIGINT
    try:
        Thread(target=interrupt_when_both_sleep, daemon=True).start()
        with pytest.raises(NoLongerWaitedFor):
            torchrun(2, script, f"{seen}{os.sep}")
    finally:
        signal(SIGUSR1, before)
    assert not any(is_alive(int(path.name)) for path in seen.iterdir())


def test_a_failure_ends_those_that_are_still_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("programs.LIMIT_SEC", 0.5)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        outputs(started)
    assert time.monotonic() - begun < 60 and all(process.poll() is not None for process in started)
