"""Which errors another attempt at a shard may not meet."""

import errno
from collections.abc import Collection

TRANSIENT_ERRORS = (
    "ConnectionError",
    "TimeoutError",
    "IncompleteRead",
    "HTTPClientError",  # botocore: connections refused, reset or too slow
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
)
TRANSIENT_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
"""Numbers of an OSError that may pass: network file systems and object stores that are busy or away for
a moment.
"""


def is_transient(error: BaseException, names: Collection[str]) -> bool:
    """Whether another attempt may go better: by class name, the bases' too, or an OSError's number."""
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return not {one.__name__ for one in type(error).__mro__}.isdisjoint(names)
