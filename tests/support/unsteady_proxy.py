"""A proxy on loopback that hands requests on to an S3 server, and now and then answers 503 or hangs up."""

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """Every `period`th request goes wrong, in one of three ways by turns; `faults` counts them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, period: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.period = urlsplit(target).netloc, period
        self.faults: Counter[str] = Counter()
        self._lock, self._number = threading.Lock(), 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self._lock:
            self._number += 1
            if self._number % self.period:
                return None
            fault = ("slow down", "hang up", "cut short")[self._number // self.period % 3]
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: connections that break are what it is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        if fault == "hang up":
            self.close_connection = True
            return
        if fault == "slow down":
            self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            self.answer(response.status, response.getheaders(), data, cut=fault == "cut short")
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        """Sends it, `cut` only the first half."""
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("date", "server", "connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def unsteady(target: str, period: int) -> Iterator[Proxy]:
    server = Proxy(target, period)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
