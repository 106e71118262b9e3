"""One writer of a data location, whichever machine it runs on: a file beside the folder with the name of its
holder, who renews it while at work.

The files are numbered, and whoever comes next creates the one above the highest, which only one can where a
store creates an object only if there is none (local disk, Amazon S3 and others). Each holder writes its own
number alone, so that nobody ever overwrites or frees what another has: of two who find a dead holder at once,
one has the next number. On stores that cannot do that both may write, and the one whose file is there a
moment later has it: good enough against a mistake, no proof. The last file stays: numbers never go down.

A holder that no longer renews is taken for dead by the clock of whoever looks: what counts is that the file
stays as it is, and no time of another machine. One of this machine whose process is gone is dead at once.
"""

import re
import signal
import threading
import time
import uuid
from collections.abc import Callable
from typing import Self

from pipelines.shards.storage import Folder
from repfusion.config import Strict
from repfusion.display.redaction import redact_text
from repfusion.locks import Holder

BEAT_SEC = 20.0
DEAD_BEATS = 5
"""A holder that did not renew its lease for so long is dead."""
SETTLE_SEC = 0.3
"""After which, of two that wrote at once, the second is seen by both."""


class _Held(Strict):
    """What a file says."""

    token: str
    """Names one taking of the lease."""
    beat: int
    """Goes up while the holder is at work."""
    holder: Holder
    is_free: bool = False
    """Whether the holder has let go of it."""


class Lease:
    """Keeps other writers out of a folder while the block runs.

    Raises:
        ValueError: another process holds it; the place is not there, or may not be written; or this one could
            not renew it, so that another may have taken it for dead: the block is interrupted, as by Ctrl-C.
    """

    def __init__(self, folder: Folder, say: Callable[[str], None] = print, beat_sec: float = BEAT_SEC):
        self.folder, self.say, self.beat_sec = folder, say, beat_sec
        self.place = Folder(folder.identity, folder.options).parent
        self.token, self.number, self.beat = uuid.uuid4().hex, 0, 0
        self.holder = Holder.here()
        self._seen: _Held | None = None
        self._seen_at: float | None = None
        self.lost: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def look(self) -> None:
        """Remembers who holds it now: of several leases that are looked at before the first is taken, those
        of one dead holder lapse together and not one after the other.
        """
        _, self._seen = self._read()
        self._seen_at = time.monotonic()

    def __enter__(self) -> Self:
        try:
            while not self._take():
                pass
        except OSError as error:
            raise ValueError(
                f"{self.folder}: its lock cannot be written ({type(error).__name__}: {error}); see that the "
                "bucket or folder is there, and may be read and written with the environment's credentials"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        self._thread.join()
        if self.lost is not None:
            raise ValueError(f"{self.folder}: {self.lost}; run it again to go on") from error
        try:
            if self._highest() == self.number:
                self.place.write(self.name_of(self.number), self._bytes(is_free=True))
        # the work is done; a store that does not answer now must not turn it into a failure
        except Exception as problem:  # noqa: BLE001
            self.say(redact_text(f"{self.folder}: its lock lapses by itself ({problem})"))

    def name_of(self, number: int) -> str:
        """The file of one taking, beside the folder."""
        return f".{self.folder.name}.{number}.lock"

    def _numbers(self) -> list[int]:
        """The numbers that there are files of, lowest first."""
        pattern = re.compile(re.escape(f".{self.folder.name}.") + r"([0-9]+)\.lock")
        found = (pattern.fullmatch(name) for name in self.place.names())
        return sorted(int(one[1]) for one in found if one)

    def _highest(self) -> int:
        """The number that counts; 0 where there is none."""
        return max(self._numbers(), default=0)

    def _take(self) -> bool:
        """Whether the lease is ours now. False where another got in between, and is to be looked at."""
        number, found = self._read()
        if found is not None and not found.is_free:
            self._wait_for_its_death(number, found)
        self.number = number + 1
        name = self.name_of(self.number)
        # a request that is sent again finds what it wrote itself
        if not self.place.create(name, self._bytes()) and self._token_of(self.number) != self.token:
            return False
        if not self.place.is_local:
            time.sleep(min(SETTLE_SEC, self.beat_sec))
        *lower, highest = self._numbers() or [0]
        if highest != self.number or self._token_of(highest) != self.token:
            return False
        self.place.remove(*map(self.name_of, lower))
        return True

    def _bytes(self, is_free: bool = False) -> bytes:
        held = _Held(token=self.token, beat=self.beat, holder=self.holder, is_free=is_free)
        return held.model_dump_json().encode()

    def _read(self) -> tuple[int, _Held | None]:
        """The highest number and what its file says; 0 and None where there is none. ValueError where it is
        no lease, which nobody would ever find dead.
        """
        while number := self._highest():
            name = self.name_of(number)
            try:
                data = self.place.read(name)
            except FileNotFoundError:
                continue  # a higher one has taken its place
            try:
                return number, _Held.model_validate_json(data)
            except ValueError as error:
                raise ValueError(
                    f"{self.place / name}: not a lock as a run writes it ({len(data):,} bytes); see that no "
                    "run is at work here, and remove it"
                ) from error
        return 0, None

    def _token_of(self, number: int) -> str | None:
        found, held = self._read()
        return held.token if held is not None and found == number else None

    def _wait_for_its_death(self, number: int, found: _Held) -> None:
        """Returns when the holder is dead, or has let go. Raises ValueError where it or another is alive."""
        if not found.holder.is_gone:
            self.say(f"{self.folder}: {found.holder} holds it; looking whether that is alive")
            if self._seen_at is None:
                self._seen, self._seen_at = found, time.monotonic()
            if self._seen != found:
                raise ValueError(self._refusal(found.holder))
            while time.monotonic() < self._seen_at + DEAD_BEATS * self.beat_sec:
                time.sleep(self.beat_sec / 4)
                now_number, now = self._read()
                if now is None or now.is_free:
                    return
                if (now_number, now.token, now.beat) != (number, found.token, found.beat):
                    raise ValueError(self._refusal(now.holder))
        self.say(f"{self.folder}: {found.holder} is dead; its lock is taken over")

    def _refusal(self, holder: Holder) -> str:
        how = f"make cancel JOB={holder.job}" if holder.job else f"kill {holder.pid} on {holder.host}"
        return (
            f"{self.folder}: another run is at work here: {holder}; wait for it, or end it ({how}) and run "
            f"this again, which takes over what a dead one left after {DEAD_BEATS * self.beat_sec:g} s; or "
            "give another data_url"
        )

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(self.beat_sec):
            self.beat += 1
            try:
                number, found = self._read()
                if found is not None and found.token == self.token:
                    self.place.write(self.name_of(number), self._bytes())
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
