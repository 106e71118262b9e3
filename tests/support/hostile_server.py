"""A web server on loopback whose pages hang, lie, drip, redirect and recover as those of the internet do."""

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    """A smooth image of the size (width, height), another one for each seed."""
    width, height = size
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).save(stream, kind)
    return stream.getvalue()


class Server(ThreadingHTTPServer):
    """`pages` answer by path; a path that is none of theirs is 404."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Callable[[Handler], None]] = {}
        self.requests: Counter[str] = Counter()
        self.times: list[float] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: clients that give up are what it is for."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests[path] += 1
        self.server.times.append(time.monotonic())
        page = self.server.pages.get(path)
        if page is None:
            self.send_error(404)
        else:
            page(self)

    def reply(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        """Sends data; `length` is what Content-Length says of it, negative leaves it out."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is None or length >= 0:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def shows(data: bytes, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(data, **headers)


def redirects(address: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(b"", 302, Location=address)


def hangs(handler: Handler) -> None:
    handler.server.closing.wait(60)


def drips(handler: Handler) -> None:
    """A byte every 50 ms, for ever."""
    handler.reply(b"", length=900)
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b".")
        handler.wfile.flush()


def never_ends(handler: Handler) -> None:
    """As many bytes as the client takes, of no stated length."""
    handler.reply(b"", length=-1)
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


def is_cut_short(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(data[: len(data) // 2], length=len(data))


def recovers(data: bytes, failures: int, status: int = 503, **headers: str) -> Callable[[Handler], None]:
    """Answers with `status` at first, then with the data."""
    left = [failures]

    def page(handler: Handler) -> None:
        left[0] -= 1
        if left[0] >= 0:
            handler.reply(b"busy", status, **headers)
        else:
            handler.reply(data)

    return page


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
