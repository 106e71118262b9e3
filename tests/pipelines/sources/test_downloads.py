"""What a download may do: whom it may ask, how much, how long, how often."""

import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import pytest
from hostile_server import drips, hangs, is_cut_short, never_ends, recovers, redirects, running, shows

import pipelines.sources.web.downloads
from pipelines.sources.web.downloads import (
    DownloadError,
    DownloadLimits,
    Downloads,
    HostRate,
    ascii_url,
    is_transient,
)

LOCAL = DownloadLimits(max_bytes=1000, allow_private_addresses=True, backoff_sec=0.01)


@pytest.fixture
def server():
    with running() as server:
        yield server


def reason_of(downloads: Downloads, address: str, timeout: float = 5.0) -> str:
    with pytest.raises(DownloadError) as caught:
        downloads.open(address, timeout=timeout)
    assert str(caught.value) == f"[{caught.value.reason}] {caught.value.detail}"
    return caught.value.reason


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0.0.0.0"])
def test_private_hosts_are_refused_however_they_are_written(server, host):
    server.pages["a"] = shows(b"secret")
    port = server.server_address[1]
    assert reason_of(Downloads(DownloadLimits(1000)), f"http://{host}:{port}/a") == "private_address"
    assert not server.requests


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    # this machine has no public address: 127.0.0.1 stands in for one, 127.0.0.2 stays what it is
    monkeypatch.setattr(pipelines.sources.web.downloads, "is_public", lambda address: address == "127.0.0.1")
    port = server.server_address[1]
    server.pages |= {"in": redirects(f"http://127.0.0.2:{port}/secret"), "secret": shows(b"secret")}
    server.pages["out"] = redirects(f"{server.address}fine")
    server.pages["fine"] = shows(b"fine")
    downloads = Downloads(DownloadLimits(1000))
    assert downloads.open(f"{server.address}out").read() == b"fine"
    assert reason_of(downloads, f"{server.address}in") == "private_address"
    assert server.requests["secret"] == 0


def test_the_address_that_was_checked_is_the_one_connected_to(server, monkeypatch):
    """A name server that says something else when asked again changes nothing."""
    asked = []
    resolve = socket.getaddrinfo

    def rebind(host, port, *args, **kwargs):
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "203.0.113.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    server.pages["a"] = shows(b"here")
    address = f"http://example.invalid:{server.server_address[1]}/a"
    assert Downloads(LOCAL).open(address).read() == b"here"
    assert asked == ["example.invalid"]


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.pages["a"] = shows(b"direct")
    assert Downloads(LOCAL).open(f"{server.address}a").read() == b"direct"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("file:///etc/hostname", "unsupported_scheme"),
        ("ftp://127.0.0.1/a", "unsupported_scheme"),
        ("data:,x", "unsupported_scheme"),
        ("http:///a", "invalid_url"),
        ("http://a b/", "invalid_url"),
        ("http://127.0.0.1:port/", "invalid_url"),
        ("http://" + "a" * 70 + ".org/", "invalid_url"),
    ],
)
def test_addresses_that_are_none(address, reason):
    assert reason_of(Downloads(LOCAL), address) == reason


def test_a_redirect_to_a_file_is_refused(server):
    server.pages["a"] = redirects("file:///etc/hostname")
    assert reason_of(Downloads(LOCAL), f"{server.address}a") == "http_302"


def test_bytes_are_capped_with_and_without_a_length(server):
    server.pages |= {"fits": shows(bytes(1000)), "large": shows(bytes(1001)), "endless": never_ends}
    server.pages["lies"] = lambda handler: handler.reply(b"x", length=10**15)
    downloads = Downloads(LOCAL)
    assert len(downloads.open(f"{server.address}fits").read()) == 1000
    for page in ("large", "endless", "lies"):
        assert reason_of(downloads, server.address + page) == "too_many_bytes", page


def test_slow_answers_end_at_the_timeout(server):
    """Also where a byte arrives now and then, which starts a socket's own timeout anew."""
    server.pages |= {"hangs": hangs, "drips": drips}
    for page in ("hangs", "drips"):
        start = time.monotonic()
        assert reason_of(Downloads(LOCAL), server.address + page, timeout=0.4) == "timeout", page
        assert 0.3 < time.monotonic() - start < 2


def test_redirects_share_one_time(server):
    """Each of them would be quick enough by itself."""

    def slowly(number: int):
        def page(handler) -> None:
            handler.server.closing.wait(0.3)
            redirects(f"{server.address}{number + 1}")(handler)

        return page

    server.pages |= {str(number): slowly(number) for number in range(10)}
    start = time.monotonic()
    assert reason_of(Downloads(LOCAL), f"{server.address}0", timeout=1.0) == "timeout"
    assert 0.9 < time.monotonic() - start < 2
    assert server.requests.total() <= 4


def test_a_name_server_that_never_answers_costs_no_more(server, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answers.wait(60))
    start = time.monotonic()
    try:
        assert reason_of(Downloads(LOCAL), "http://example.invalid/", timeout=0.4) == "timeout"
        assert 0.3 < time.monotonic() - start < 2
    finally:
        answers.set()


def test_waiting_for_ones_own_turn_is_not_the_servers_time(server):
    server.pages |= {"a": redirects(f"{server.address}b"), "b": shows(b"fine")}
    limits = DownloadLimits(1000, allow_private_addresses=True, max_requests_per_sec_per_host=2)
    assert Downloads(limits).open(f"{server.address}a", timeout=0.4).read() == b"fine"


def test_broken_connections(server):
    server.pages |= {"cut": is_cut_short(bytes(900)), "dead": lambda handler: handler.close_connection}
    assert reason_of(Downloads(LOCAL), f"{server.address}cut") == "incomplete_read"
    assert reason_of(Downloads(LOCAL), f"{server.address}dead") == "connection_error"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert reason_of(Downloads(LOCAL), f"http://127.0.0.1:{port}/") == "connection_error"


def test_plain_http_where_https_is_asked_for(server):
    port = server.server_address[1]
    assert reason_of(Downloads(LOCAL), f"https://127.0.0.1:{port}/") == "tls_failure"


def test_certificates_are_checked(server, tmp_path, monkeypatch):
    names = "subjectAltName=IP:127.0.0.1"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=elsewhere -keyout key.pem -out cert.pem"
    )
    subprocess.run([*command.split(), "-addext", names], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.pages |= {"a": shows(b"fine"), "drips": drips}
    address = server.address.replace("http:", "https:")
    assert reason_of(Downloads(LOCAL), f"{address}a") == "tls_failure"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    trusting = Downloads(LOCAL)
    assert trusting.open(f"{address}a").read() == b"fine"
    assert reason_of(trusting, f"{address}drips", timeout=0.5) == "timeout"
    assert reason_of(trusting, address.replace("127.0.0.1", "localhost") + "a") == "tls_failure"


def test_only_what_may_pass_is_tried_again(server):
    server.pages["busy"] = recovers(b"fine", 2)
    server.pages["gone"] = recovers(b"never", 9, status=410)
    server.pages["down"] = recovers(b"never", 9, status=500)
    downloads = Downloads(DownloadLimits(1000, allow_private_addresses=True, retries=2, backoff_sec=0.05))
    start = time.monotonic()
    assert downloads.open(f"{server.address}busy").read() == b"fine"
    assert time.monotonic() - start > 0.05 + 0.1
    assert reason_of(downloads, f"{server.address}gone") == "http_410"
    assert reason_of(downloads, f"{server.address}down") == "http_500"
    assert server.requests == {"busy": 3, "gone": 1, "down": 3}


def test_a_server_is_left_alone_as_long_as_it_asks(server):
    server.pages["a"] = recovers(b"fine", 1, status=429, Retry_After="1")
    downloads = Downloads(DownloadLimits(1000, allow_private_addresses=True, retries=1, backoff_sec=0.01))
    assert downloads.open(f"{server.address}a").read() == b"fine"
    assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    ("reason", "transient"),
    [
        ("timeout", True),
        ("connection_error", True),
        ("http_429", True),
        ("http_503", True),
        ("http_404", False),
        ("host_not_found", False),
        ("private_address", False),
        ("undecodable_image", False),
        ("http_5", False),
    ],
)
def test_transient_reasons(reason, transient):
    assert is_transient(reason) is transient


def test_requests_to_a_host_are_spaced_out_over_all_threads(server):
    server.pages["a"] = shows(b"x")
    limits = DownloadLimits(1000, allow_private_addresses=True, max_requests_per_sec_per_host=20)
    downloads = Downloads(limits)
    threads = [threading.Thread(target=downloads.open, args=[server.address + "a"]) for _ in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.times[-1] - server.times[0] > 10 / 20 - 0.05


def test_hosts_wait_for_themselves_alone():
    rate = HostRate(2)
    start = time.monotonic()
    for host in "abcdefgh":
        rate.wait(host)
    assert time.monotonic() - start < 0.2
    rate.wait("a")
    assert time.monotonic() - start > 0.45


def test_urlopen_is_guarded_inside_the_block_alone(server):
    server.pages["a"] = shows(b"x")
    downloads = Downloads(DownloadLimits(1000))
    with downloads.installed():
        with downloads.installed(), pytest.raises(DownloadError, match="private_address"):
            urllib.request.urlopen(f"{server.address}a")
        with pytest.raises(DownloadError, match="private_address"):
            urllib.request.urlopen(f"{server.address}a")
    assert urllib.request.urlopen(f"{server.address}a").read() == b"x"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h/a b.png", "http://h/a%20b.png"),
        (" http://h/a.png ", "http://h/a.png"),
        ("http://h/é/ü.png?q=ß x", "http://h/%C3%A9/%C3%BC.png?q=%C3%9F%20x"),
        ("http://h/%C3%A9 %20%", "http://h/%C3%A9%20%20%"),
        ("http://bücher.example:8080/é", "http://xn--bcher-kva.example:8080/%C3%A9"),
        ("http://straße.example/", "http://xn--strae-oqa.example/"),
        ("http://ü:p@例え.テスト/x", "http://%C3%BC:p@xn--r8jz45g.xn--zckzah/x"),
        ("HTTP://h/a?b=[c]|d&e='f'#g", "HTTP://h/a?b=[c]|d&e='f'#g"),
        ("http://h/a?", "http://h/a?"),
        ("http://h/a\nb", "http://h/a\nb"),
        ("no address", "no%20address"),
        ("", ""),
    ],
)
def test_addresses_are_requested_in_ascii(url, asked):
    assert ascii_url(url) == asked == ascii_url(asked)


@pytest.mark.parametrize("url", ["http://[", "http://a b/", "http://\u2488com/", "http://xn--\u00e9/"])
def test_what_is_no_address_is_a_value_error(url):
    with pytest.raises(ValueError):
        ascii_url(url)
