"""An evaluation beside a training takes only time that nobody else wants, until the training is over."""

import json
import os
import subprocess
import sys

import pytest

from pipelines.runtime.pace import CAN_IDLE

BESIDE_A_BUSY_PROCESS = """
import json, os, subprocess, sys, time
from pipelines.runtime.pace import Pace

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
if os.getuid() == 0 and sys.argv[1] == "unprivileged":
    os.setgid(65534)
    os.setuid(65534)

def share():
    started, used = time.monotonic(), time.thread_time()
    while time.monotonic() - started < 2:
        pass
    return (time.thread_time() - used) / 2

pace = Pace(True)
time.sleep(0.5)
idle, waited_sec = pace(share), pace.waited_sec()
pace.lift()
schedule = os.sched_getscheduler(pace._thread_id)
print(json.dumps({"idle": idle, "waited_sec": waited_sec, "schedule": schedule, "lifted": pace(share)}))
"""


@pytest.mark.skipif(not CAN_IDLE, reason="needs SCHED_IDLE")
@pytest.mark.parametrize("user", ["privileged", "unprivileged"])
def test_idle_work_yields_to_a_busy_process_and_gets_its_share_once_lifted(user: str):
    command = [sys.executable, "-c", BESIDE_A_BUSY_PROCESS, user]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            found = json.loads(process.stdout.readline())
        finally:
            os.killpg(process.pid, 9)
    assert found["idle"] < 0.1 and found["waited_sec"] > 1.5
    assert found["lifted"] > 0.03 and found["lifted"] > 5 * found["idle"]
    if user == "unprivileged" and os.getuid() == 0:
        assert found["schedule"] == os.SCHED_IDLE  # its thread cannot leave; the work went on in another
