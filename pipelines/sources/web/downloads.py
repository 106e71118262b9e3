"""Addresses from lists that strangers wrote -> bytes: what img2dataset downloads passes through here.

A host is resolved once and connected to at the very address that was checked, redirects included; bytes and
time are bounded, requests to one host are spaced out, and failures that may pass are tried again.
"""

import functools
import http.client
import io
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit
from urllib.response import addinfourl

from pipelines.sources.web.addresses import is_public

TRANSIENT_REASONS = frozenset(
    {"timeout", "connection_error", "dns_failure", "incomplete_read", "http_408", "http_425", "http_429"}
)
"""Reasons of failed downloads that may succeed later, as those with an http_5xx may."""
MAX_WAIT_SEC = 30.0
"""Longest wait between two attempts, whatever a server asks for."""
DEFAULT_TIMEOUT_SEC = 10.0
BLOCK_BYTES = 1 << 16
KNOWN_HOSTS = 10_000
"""Hosts whose last request is remembered before those that are free again are forgotten."""


def is_transient(reason: str) -> bool:
    """Whether a sample dropped for this reason may be had later."""
    return reason in TRANSIENT_REASONS or re.fullmatch(r"http_5\d\d", reason) is not None


def ascii_url(url: str) -> str:
    """An address as it is requested: spaces around it go, those in it and letters that are not ASCII are
    percent-encoded, a host's by IDNA. What is ASCII already, %XX included, stays as it is.

    Raises:
        ValueError: for what is no address, and a host with a space or one that IDNA does not know.
    """
    url = url.strip(" ")
    netloc = urlsplit(url).netloc
    if " " in netloc:
        raise ValueError(f"{netloc!r} is no host")
    if not netloc.isascii():
        from idna import encode

        login, at, place = netloc.rpartition("@")
        host, colon, port = place.partition(":")
        url = url.replace(netloc, f"{login}{at}{encode(host, uts46=True).decode()}{colon}{port}", 1)
    return re.sub("[^\0-\x1f!-\x7f]+", lambda found: quote(found[0]), url)


class DownloadError(Exception):
    """A download that failed; `reason` is counted, `detail` is for people. Its text is `[reason] detail`, as
    img2dataset passes on nothing else.

    `wait_sec` is how long the server asked to be left alone, None where it did not.
    """

    def __init__(self, reason: str, detail: str, wait_sec: float | None = None):
        super().__init__(f"[{reason}] {detail}")
        self.reason, self.detail, self.wait_sec = reason, detail, wait_sec


@dataclass(frozen=True)
class DownloadLimits:
    """What a download may do."""

    max_bytes: int
    """Size of a body; more is refused, with or without a Content-Length that tells."""
    allow_private_addresses: bool = False
    """Whether hosts may be private, loopback, link-local or otherwise not of the public internet."""
    retries: int = 0
    """Further attempts after a failure that may pass."""
    backoff_sec: float = 1.0
    """Wait before the second attempt; doubled for each further one."""
    max_requests_per_sec_per_host: float | None = None
    """Requests of this process; redirects count. None is no limit."""


class HostRate:
    """Spaces out requests to one host, over all threads."""

    def __init__(self, per_sec: float | None):
        self._interval_sec = None if per_sec is None else 1 / per_sec
        self._free_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def wait(self, host: str) -> float:
        """Returns when the next request to the host may go out; how many seconds that took."""
        if self._interval_sec is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            if len(self._free_at) > KNOWN_HOSTS:
                self._free_at = {name: free for name, free in self._free_at.items() if free > now}
            turn = max(now, self._free_at.get(host, now))
            self._free_at[host] = turn + self._interval_sec
        time.sleep(turn - now)
        return turn - now


class _Allowance(float):
    """Seconds for a request, which urllib hands on to every connection of it, redirects included, and the
    moment at which they are over.
    """

    def __new__(cls, seconds: float) -> "_Allowance":
        made = super().__new__(cls, seconds)
        made.deadline = time.monotonic() + seconds
        return made

    deadline: float

    def extend(self, seconds: float) -> None:
        """Our own waiting is not the servers' fault."""
        self.deadline += seconds


class Downloads:
    """An opener for urllib: `open` returns a response whose body lies in memory.

    http and https only, no proxies from the environment, certificates checked. May be used from several
    threads.
    """

    _installing: ClassVar[threading.Lock] = threading.Lock()
    _installed: ClassVar["Downloads | None"] = None

    def __init__(self, limits: DownloadLimits):
        self.limits = limits
        self._users = 0
        self._director = urllib.request.OpenerDirector()
        for handler in (
            _Handler(limits),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._director.add_handler(handler)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Everything in the process that calls `urllib.request.urlopen` goes through this object for the
        length of the block, which several threads may enter.
        """
        with self._installing:
            assert Downloads._installed in (None, self), "one set of limits at a time"
            Downloads._installed = self
            self._users += 1
            urllib.request.install_opener(self)  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            with self._installing:
                self._users -= 1
                if not self._users:
                    Downloads._installed = None
                    urllib.request.install_opener(None)  # pyright: ignore[reportArgumentType]

    def open(
        self, request: urllib.request.Request | str, data: None = None, timeout: float = 10
    ) -> addinfourl:
        """The response to a GET, read to its end. An attempt may take `timeout` seconds from the names'
        resolution to the last byte, its redirects included.

        Raises:
            DownloadError: the last attempt's.
        """
        if not isinstance(timeout, int | float):
            timeout = DEFAULT_TIMEOUT_SEC  # urlopen hands on a mark where its caller gave none
        attempt = 0
        while True:
            try:
                return self._attempt(request, timeout)
            except DownloadError as error:
                if attempt == self.limits.retries or not is_transient(error.reason):
                    raise
                wait_sec = max(self.limits.backoff_sec * 2**attempt, error.wait_sec or 0)
            time.sleep(min(wait_sec, MAX_WAIT_SEC))
            attempt += 1

    def _attempt(self, request: urllib.request.Request | str, timeout: float) -> addinfourl:
        try:
            with self._director.open(request, timeout=_Allowance(timeout)) as response:
                body = io.BytesIO(response.read())
                return addinfourl(body, response.headers, response.url, response.status)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _explained(error, timeout) from error


def _explained(error: BaseException, timeout: float) -> DownloadError:
    """Details name no address, so that they are the same on every machine."""
    match error:
        case urllib.error.HTTPError():
            error.close()
            return DownloadError(f"http_{error.code}", str(error.reason), _wait_sec(error.headers))
        case urllib.error.URLError(reason=BaseException() as inner):
            return _explained(inner, timeout)
        case urllib.error.URLError():
            unknown = str(error.reason).startswith("unknown url type")
            return DownloadError("unsupported_scheme" if unknown else "invalid_url", str(error.reason))
        case TimeoutError():
            return DownloadError("timeout", f"not complete within {timeout:g} s")
        case socket.gaierror(errno=socket.EAI_NONAME | socket.EAI_NODATA):
            return DownloadError("host_not_found", str(error.strerror))
        case socket.gaierror():
            return DownloadError("dns_failure", str(error.strerror))
        case ssl.SSLError():
            return DownloadError("tls_failure", str(error.reason or error))
        case http.client.IncompleteRead():
            return DownloadError("incomplete_read", "the connection ended before the body did")
        case OSError():
            return DownloadError("connection_error", error.strerror or type(error).__name__)
        case http.client.InvalidURL() | ValueError():
            return DownloadError("invalid_url", type(error).__name__)
    return DownloadError("bad_response", type(error).__name__)


def _wait_sec(headers: Message) -> float | None:
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None


class _Handler(urllib.request.AbstractHTTPHandler):
    """One request, of http or https, a connection of its own to each."""

    def __init__(self, limits: DownloadLimits):
        super().__init__()
        self._limits = limits
        self._rate = HostRate(limits.max_requests_per_sec_per_host)
        self._context = ssl.create_default_context()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(req, None)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(req, self._context)

    def http_request(self, req: urllib.request.Request) -> urllib.request.Request:
        return self.do_request_(req)

    https_request = http_request

    def _open(self, req: urllib.request.Request, context: ssl.SSLContext | None) -> http.client.HTTPResponse:
        allowance = req.timeout
        assert isinstance(allowance, _Allowance)
        allowance.extend(self._rate.wait(req.host.lower()))
        return self.do_open(functools.partial(_Connection, limits=self._limits, context=context), req)


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was checked, and no longer than the request's allowance lasts."""

    def __init__(
        self, host: str, timeout: _Allowance, limits: DownloadLimits, context: ssl.SSLContext | None
    ) -> None:
        self.default_port = http.client.HTTP_PORT if context is None else http.client.HTTPS_PORT
        super().__init__(host, timeout=timeout)
        self._limits, self._tls, self._deadline = limits, context, timeout.deadline

    def connect(self) -> None:
        sock = self._connect()
        try:
            if self._tls is not None:
                sock.settimeout(_remaining(self._deadline))
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    def _connect(self) -> socket.socket:
        found = _resolve(self.host, self.port, self._deadline)
        if not self._limits.allow_private_addresses:
            found = [entry for entry in found if is_public(str(entry[4][0]))]
        if not found:
            raise DownloadError(
                "private_address",
                "the host has no public address; ingest.allow_private_addresses permits others",
            )
        failure: OSError | None = None
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_remaining(self._deadline))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as error:
                sock.close()
                failure = error
        assert failure is not None
        raise failure

    def response_class(self, sock: socket.socket, **options: Any) -> "_Response":  # pyright: ignore
        return _Response(_TimedSocket(sock, self._deadline), self._limits.max_bytes, **options)


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """What getaddrinfo says, asked in a thread of its own: nothing can interrupt it, and a name server may
    never answer. Raises TimeoutError, and what it raises.
    """
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        # Whatever it is, it is raised where the answer is waited for.
        except Exception as error:  # noqa: BLE001
            answer.set_exception(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    return answer.result(_remaining(deadline))


def _remaining(deadline: float) -> float:
    """Seconds until a moment of time.monotonic(). Raises TimeoutError where it has passed."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("timed out")
    return remaining


class _TimedStream(io.RawIOBase):
    """A socket's stream up to a moment: its own timeout starts anew with every byte that drips in."""

    def __init__(self, sock: socket.socket, deadline: float):
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_remaining(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


@dataclass
class _TimedSocket:
    """What an HTTPResponse wants of a socket."""

    sock: socket.socket
    deadline: float

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedStream(self.sock, self.deadline))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: _TimedSocket, max_bytes: int, **options: Any):
        super().__init__(sock, **options)  # pyright: ignore[reportArgumentType]
        self._max_bytes = max_bytes

    def read(self, amt: int | None = None) -> bytes:
        """Reads as the base class does; without `amt`, never more than the limit."""
        if amt is not None:
            return super().read(amt)
        if self.length is not None and self.length <= self._max_bytes:
            return super().read()
        blocks: list[bytes] = []
        total = 0
        while self.length is None and total <= self._max_bytes and (block := super().read(BLOCK_BYTES)):
            blocks.append(block)
            total += len(block)
        if self.length is not None or total > self._max_bytes:
            raise DownloadError("too_many_bytes", f"the body has more than {self._max_bytes:,} bytes")
        return b"".join(blocks)
