"""How long a call may take: what is not done by then is kept, and goes on when it is asked for again."""

import time


class OutOfTime(Exception):
    """A deadline has come. What was done so far is kept; calling again goes on from there."""


def has_come(until: float | None) -> bool:
    """Whether a deadline, in seconds of `time.monotonic`, lies behind; None never comes."""
    return until is not None and time.monotonic() >= until
