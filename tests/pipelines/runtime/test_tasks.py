"""Tasks in processes of their own: each outcome is told once, a dead process is one, waiting ends."""

import os
import time

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from pipelines.runtime.tasks import AtWork, run_on_ray

pytestmark = pytest.mark.ray


def work(task: str) -> str:
    if task == "fails":
        raise ValueError("no")
    if task == "dies":
        os._exit(1)
    return f"{task} in {os.getpid()}"


def sleep() -> None:
    time.sleep(30)


def test_each_runs_in_a_process_of_its_own_and_a_failure_stops_nothing_else(ray_local, pool):
    pool.close()  # its idle actors hold the CPUs
    outcomes = dict(run_on_ray(work, ["one", "fails", "dies", "two"], {"num_cpus": 1}))
    assert isinstance(outcomes["fails"], RayTaskError) and "no" in str(outcomes["fails"])
    assert isinstance(outcomes["dies"], WorkerCrashedError)
    first, second = (str(outcomes[name]).rpartition(" ")[2] for name in ("one", "two"))
    assert first != second


def test_what_was_forgotten_is_not_told_and_what_nobody_took_is_told_later(ray_local):
    at_work: AtWork[str] = AtWork()
    for name in ("one", "two", "three"):
        at_work.add(name, ray.put(name.upper()))
    at_work.forget("two")
    assert at_work.tasks == ["one", "three"]
    taken = next(at_work.ended(1.0))
    assert [taken, *at_work.ended(1.0)] == [("one", "ONE"), ("three", "THREE")]
    assert list(at_work.ended(1.0)) == []


def test_waiting_ends_with_the_time(ray_local):
    at_work: AtWork[str] = AtWork()
    at_work.add("slow", ray.remote(num_cpus=0)(sleep).remote())
    started = time.monotonic()
    assert list(at_work.ended(0.2)) == [] and time.monotonic() - started < 10
    assert at_work.tasks == ["slow"]
