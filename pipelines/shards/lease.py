"""One writer of a folder behind a URL: an object beside it, with the name of its holder, who renews it while
at work.

Where the store can create an object only if there is none (Amazon S3 and others, through s3fs), two processes
never both get it. Elsewhere both may write, and the one whose object is there a moment later has it: good
enough against a mistake, no proof. A holder that no longer renews is taken for dead, by the clock of whoever
looks; one of this machine whose process is gone at once.
"""

import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from pipelines.shards.storage import Folder
from repfusion.config import Strict
from repfusion.locks import Holder

BEAT_SEC = 20.0
DEAD_BEATS = 5
"""A holder that did not renew its lease for so long is dead."""
SETTLE_SEC = 0.3
"""After which, of two that wrote at once, the second is seen by both."""


class _Held(Strict):
    """What the object says."""

    token: str
    beat: int
    """Goes up while the holder is at work."""
    holder: Holder


class Lease:
    """Keeps other writers out of a remote folder while the block runs.

    Raises:
        ValueError: another process holds it; or this one could not renew it, so that another may have taken
            it for dead: the block is interrupted, as by Ctrl-C.
    """

    def __init__(self, folder: Folder, say: Callable[[str], None] = print, beat_sec: float = BEAT_SEC):
        self.folder, self.say, self.beat_sec = folder, say, beat_sec
        self.place, self.name = folder.parent, f".{folder.name}.lock.json"
        self.token, self.beat = uuid.uuid4().hex, 0
        self.lost: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        while not self._take():
            self._wait_for_its_end()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        self._thread.join()
        if self.lost is not None:
            raise ValueError(f"{self.folder}: {self.lost}; run it again to go on") from error
        with suppress(ValueError):  # what is no lease is not ours to remove
            if (found := self._read()) is not None and found.token == self.token:
                self.place.remove(self.name)

    def _take(self) -> bool:
        if not self.place.create(self.name, self._bytes()):
            return False
        time.sleep(min(SETTLE_SEC, self.beat_sec))
        found = self._read()
        return found is not None and found.token == self.token

    def _bytes(self) -> bytes:
        held = _Held(token=self.token, beat=self.beat, holder=Holder.here())
        return held.model_dump_json().encode()

    def _read(self) -> _Held | None:
        """What the object says; None where there is none. ValueError where it is no lease, which nobody would
        ever find dead.
        """
        try:
            data = self.place.read(self.name)
        except FileNotFoundError:
            return None
        try:
            return _Held.model_validate_json(data)
        except ValueError as error:
            raise ValueError(
                f"{self.place / self.name}: not a lock as a run writes it ({len(data):,} bytes); see that no "
                "run is at work here, and remove it"
            ) from error

    def _wait_for_its_end(self) -> None:
        """Returns when the lease is free. Raises ValueError where its holder is alive."""
        found = self._read()
        if found is not None and not found.holder.is_gone:
            self.say(f"{self.folder}: {found.holder} holds it; looking whether that is alive")
            end = time.monotonic() + DEAD_BEATS * self.beat_sec
            while time.monotonic() < end:
                time.sleep(self.beat_sec / 4)
                now = self._read()
                if now is None:
                    return
                if (now.token, now.beat) != (found.token, found.beat):
                    raise ValueError(
                        f"{self.folder}: another run is at work here: {now.holder}; wait for it, or give "
                        "another data_url"
                    )
        now = self._read()
        if now is None or found is None or now.token == found.token:
            if found is not None:
                self.say(f"{self.folder}: {found.holder} is dead; its lock is removed")
            self.place.remove(self.name)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(self.beat_sec):
            self.beat += 1
            try:
                found = self._read()
                if found is not None and found.token == self.token:
                    self.place.write(self.name, self._bytes())
                    renewed = time.monotonic()
                    continue
                self._lose("its lock went to " + ("nobody" if found is None else str(found.holder)))
            # keeps a run alive over a store that does not answer for a while, whatever its client raises
            except Exception as error:  # noqa: BLE001
                if time.monotonic() - renewed < (DEAD_BEATS - 1) * self.beat_sec:
                    continue
                self._lose(f"its lock could not be renewed ({type(error).__name__}: {error})")
            return

    def _lose(self, why: str) -> None:
        self.lost = why
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # wakes it from whatever it waits for
