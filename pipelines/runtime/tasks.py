"""Tasks of Ray, each in a process of its own: what is at work, and how each ended."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from pipelines.runtime.session import PATIENCE_SEC, check_ray_lives

T = TypeVar("T")
SAY_SEC = 60.0
"""Between two lines about what is at work."""


class AtWork(Generic[T]):
    """Tasks, and Ray's references to their results."""

    def __init__(self) -> None:
        self._tasks: dict[Any, T] = {}

    @property
    def tasks(self) -> list[T]:
        """The tasks that have not ended, in the order in which they began."""
        return list(self._tasks.values())

    def add(self, task: T, result: Any) -> None:
        self._tasks[result] = task

    def forget(self, task: T) -> None:
        """Whatever comes of the task, it is not told."""
        self._tasks = {result: one for result, one in self._tasks.items() if one is not task}

    def ended(self, timeout_sec: float) -> Iterator[tuple[T, Any]]:
        """Waits until one ends or the time is over. Gives all that have ended, each with what it returned or
        with the RayError that it ended in; those that nobody took are given by the next call.
        """
        import ray
        from ray.exceptions import RayError

        if not self._tasks:
            return
        ray.wait(list(self._tasks), timeout=timeout_sec)
        ended, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        for result in ended:
            task = self._tasks.pop(result)
            try:
                outcome = ray.get(result)
            except RayError as error:
                outcome = error
            yield task, outcome


def run_on_ray(
    function: Callable[[T], str],
    tasks: Sequence[T],
    options: Mapping[str, float],
    on_wait: Callable[[Sequence[T]], None] = lambda left: None,
) -> Iterator[tuple[T, str | Exception]]:
    """Each task with what the function returned or the error it ended in, as they end. They start in order,
    as the resources that `options` reserve become free.

    Raises:
        StageError: Ray has no node left.
    """
    import ray

    remote = ray.remote(max_calls=1, max_retries=0, **options)(function)
    at_work: AtWork[T] = AtWork()
    for task in tasks:
        at_work.add(task, remote.remote(task))
    said = time.monotonic()
    while at_work.tasks:
        ended = list(at_work.ended(PATIENCE_SEC))
        yield from ended
        if not ended:
            check_ray_lives()
        if time.monotonic() - said > SAY_SEC:
            said = time.monotonic()
            on_wait(at_work.tasks)
