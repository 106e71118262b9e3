"""What a training logs -> the store, from a background thread: tried again while the store is away, so that
logging neither stops nor slows a training.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from repfusion.display.redaction import redact_text
from repfusion.tracking.store import MAX_BATCH_METRICS, Point, is_lasting

log = logging.getLogger("repfusion.tracking")
GATHER_SEC = 1.0
"""What comes within this time goes in one request."""
MAX_PAUSE_SEC = 30.0
MAX_TASKS = 10_000


class Outbox:
    """Metrics and other calls that wait, in memory. `put` and `put_task` return at once.

    Args:
        send: takes points to the store; called again with the same ones where it raises.
        max_metrics: values that wait at most; beyond, the oldest are dropped and counted.
        where: the store's name in messages.
    """

    def __init__(self, send: Callable[[Sequence[Point]], None], max_metrics: int, where: str):
        self.send, self.max_metrics, self.where = send, max_metrics, where
        self.points: deque[Point] = deque()
        self.tasks: deque[tuple[str, Callable[[], object]]] = deque()
        self.num_waiting = 0
        """Metric values in `points`."""
        self.num_leaving = 0
        """Values or calls that are being sent."""
        self.num_dropped = 0
        """Values and calls that were given up."""
        self.num_failures = 0
        """Rounds in a row in which something could not be sent."""
        self.is_sending = self.is_closed = False
        self.changed = threading.Condition()
        self.hurry = threading.Event()
        self.thread = threading.Thread(target=self._run, name="repfusion-tracking", daemon=True)
        self.thread.start()

    def put(self, point: Point) -> None:
        with self.changed:
            self.points.append(point)
            self.num_waiting += len(point.values)
            self._trim()
            self.changed.notify_all()

    def put_task(self, what: str, task: Callable[[], object]) -> None:
        """`what` names it in messages."""
        with self.changed:
            self.tasks.append((what, task))
            if len(self.tasks) > MAX_TASKS:
                self._drop(1, self.tasks.popleft()[0], "too many calls wait")
            self.changed.notify_all()

    def flush(self, limit_sec: float) -> bool:
        """Waits until all has been sent; False where `limit_sec` was too short."""
        self.hurry.set()
        with self.changed:
            self.changed.notify_all()
            done = self.changed.wait_for(self._is_empty, limit_sec)
        self.hurry.clear()
        return done

    def close(self, limit_sec: float) -> int:
        """Sends what waits, within `limit_sec`, and ends the thread; returns how many values and calls were
        given up in the outbox's life.
        """
        self.flush(limit_sec)
        with self.changed:
            self.is_closed = True
            if not self._is_empty():
                left = self.num_waiting + len(self.tasks) + self.num_leaving
                names = ["metrics"] * bool(self.num_waiting) + [what for what, _ in self.tasks]
                self._drop(
                    left, ", ".join(dict.fromkeys(names)), f"the run ended, {limit_sec:g} s were not enough"
                )
            self.points.clear()
            self.tasks.clear()
            self.num_waiting = 0
            self.hurry.set()
            self.changed.notify_all()
        self.thread.join(1.0)
        return self.num_dropped

    def _is_empty(self) -> bool:
        return not (self.points or self.tasks or self.is_sending)

    def _trim(self) -> None:
        while self.num_waiting > self.max_metrics and self.points:
            if self.num_dropped == 0:
                log.warning("%s: over %d values wait; the oldest are dropped", self.where, self.max_metrics)
            oldest = len(self.points.popleft().values)
            self.num_waiting -= oldest
            self.num_dropped += oldest

    def _drop(self, count: int, what: str, why: object) -> None:
        self.num_dropped += count
        reason = redact_text(str(why))
        log.warning("%s: not logged, %d values or calls: %s (%s)", self.where, count, what, reason)

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.points or self.tasks or self.is_closed)
            self.hurry.wait(GATHER_SEC)
            with self.changed:
                if self.is_closed:
                    return
                self.is_sending = True
            failure = self._send_points() or self._run_tasks()
            with self.changed:
                self.is_sending = False
                self.changed.notify_all()
            self._tell(failure)
            if failure is not None:
                self._pause()

    def _tell(self, failure: Exception | None) -> None:
        """Says once that the store is away, and once that it is back."""
        if failure is None:
            if self.num_failures:
                log.warning("%s: answers again, what waited has been sent", self.where)
            self.num_failures = 0
            return
        self.num_failures += 1
        if self.num_failures == 1:
            reason = (redact_text(str(failure)).splitlines() or [repr(failure)])[0]
            log.warning("%s: cannot be written to; training goes on, metrics wait (%s)", self.where, reason)

    def _pause(self) -> None:
        until = time.monotonic() + min(0.25 * 2 ** min(self.num_failures, 10), MAX_PAUSE_SEC)
        while (left := until - time.monotonic()) > 0 and not self.is_closed:
            if self.hurry.wait(left):  # one who waits for the end has the next attempt sooner
                time.sleep(0.5)
                return

    def _send_points(self) -> Exception | None:
        """What stopped it; None where all were sent."""
        while taken := self._take():
            failure = self._attempt(partial(self.send, taken))
            if failure is None:
                continue
            if not is_lasting(failure):
                self._put_back(taken)
                return failure
            # one wrong value must not take the others with it
            for index, point in enumerate(taken):
                failure = self._attempt(partial(self.send, [point]))
                if failure is not None and not is_lasting(failure):
                    self._put_back(taken[index:])
                    return failure
                if failure is not None:
                    self._drop(len(point.values), f"metrics of step {point.step}", failure)
        return None

    def _run_tasks(self) -> Exception | None:
        first: Exception | None = None
        for _ in range(len(self.tasks)):
            with self.changed:
                if not self.tasks:
                    break
                what, task = self.tasks.popleft()
                self.num_leaving = 1
            failure = self._attempt(task)
            if failure is None:
                continue
            if is_lasting(failure):
                self._drop(1, what, failure)
                continue
            with self.changed:
                # behind the others: one that always fails holds up none
                if not self.is_closed:
                    self.tasks.append((what, task))
            if first is not None:
                return first  # two in a row: the store itself is away
            first = failure
        return first

    def _take(self) -> list[Point]:
        taken: list[Point] = []
        size = 0
        with self.changed:
            while self.points and (not taken or size + len(self.points[0].values) <= MAX_BATCH_METRICS):
                taken.append(self.points.popleft())
                size += len(taken[-1].values)
            self.num_waiting -= size
            self.num_leaving = size
        return taken

    def _put_back(self, points: list[Point]) -> None:
        with self.changed:
            if not self.is_closed:
                self.points.extendleft(reversed(points))
                self.num_waiting += sum(len(one.values) for one in points)
                self._trim()

    def _attempt(self, action: Callable[[], object]) -> Exception | None:
        try:
            action()
        # Whatever goes wrong in logging, the training goes on.
        except Exception as error:  # noqa: BLE001
            return error
        finally:
            self.num_leaving = 0
        return None
