"""Images from the web: what is never fetched, and what is cut off.

Names are looked up in a table and connections to public addresses lead to a server on loopback, so nothing leaves the
machine. Every trick has an image waiting behind it: were it followed, the image would come.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm.apps.api import remote
from vlm.apps.api.errors import ApiError
from vlm.apps.api.remote import Fetcher, is_public, is_web_url, parse_url
from vlm.errors import ConfigError

PUBLIC = "93.184.216.34"
IMAGE = b"picture"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture"
Handle = Callable[[socket.socket], None]


class Web:
    """The internet of one test: a resolver, and a server behind every address."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {"images.example": [PUBLIC]}
        self.looked_up: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.handle: Handle = lambda connection: connection.sendall(GOOD)
        self.context: ssl.SSLContext | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(host)
        if host not in self.addresses:
            raise socket.gaierror("no such name")
        return self.addresses[host]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        connection = socket.socket()
        connection.settimeout(seconds)
        connection.connect(("127.0.0.1", self._port))
        return connection

    def fetch(
        self,
        url: str,
        *domains: str,
        seconds: float = 5.0,
        max_bytes: int = 1000,
        context: ssl.SSLContext | None = None,
    ) -> bytes:
        fetcher = Fetcher(
            domains or ("images.example",), seconds, max_bytes, resolve=self.resolve, connect=self.connect,
            context=context,
        )  # fmt: skip
        return asyncio.run(fetcher.fetch(url))

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                if self.context is not None:
                    connection = self.context.wrap_socket(connection, server_side=True)
                request = b""
                while b"\r\n\r\n" not in request and (part := connection.recv(4096)):
                    request += part
                self.requests.append(request)
                self.handle(connection)
            except OSError:
                return  # the client has cut it


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


def refusal(web: Web, url: str, *domains: str, **settings: float) -> ApiError:
    with pytest.raises(ApiError) as caught:
        web.fetch(url, *domains, **settings)  # type: ignore[arg-type]
    return caught.value


def test_an_allowed_image_is_fetched_from_the_address_that_was_checked(web: Web):
    assert web.fetch("http://images.example/cats/1.png?size=2") == IMAGE
    assert web.connected == [(PUBLIC, 80)]
    lines = web.requests[0].split(b"\r\n")
    assert lines[0] == b"GET /cats/1.png?size=2 HTTP/1.1"
    assert b"Host: images.example" in lines


def test_a_port_must_be_named(web: Web):
    assert refusal(web, "http://images.example:8080/1.png").code == "image_refused"
    assert web.fetch("http://images.example:8080/1.png", "images.example:8080") == IMAGE
    assert b"Host: images.example:8080" in web.requests[0]
    assert web.fetch("http://images.example:80/1.png") == IMAGE
    assert refusal(web, "http://images.example/1.png", "images.example:8080").code == "image_refused"


def test_by_default_nothing_is_fetched(web: Web):
    fetcher = Fetcher((), 5, 1000, resolve=web.resolve, connect=web.connect)
    with pytest.raises(ApiError, match="allow-media-domain"):
        asyncio.run(fetcher.fetch("http://images.example/1.png"))
    assert (web.looked_up, web.connected) == ([], [])


TRICKS = [
    "http://127.0.0.1/1.png",
    "http://127.0.0.1:8000/1.png",
    "http://localhost/1.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://2130706433/1.png",  # 127.0.0.1 in decimal
    "http://0x7f000001/1.png",  # in hexadecimal
    "http://0x7f.0.0.1/1.png",
    "http://0177.0.0.1/1.png",  # in octal
    "http://127.1/1.png",  # short
    "http://[::1]/1.png",
    "http://[::ffff:127.0.0.1]/1.png",  # mapped
    "http://[::ffff:7f00:1]/1.png",
    "http://[64:ff9b::7f00:1]/1.png",
    "http://100.64.0.1/1.png",
    "http://0.0.0.0/1.png",
    "http://0/1.png",
    "http://images.example\\@127.0.0.1/1.png",  # two parsers, two hosts
    "http://127.0.0.1\\@images.example/1.png",
    "http:\\\\127.0.0.1\\1.png",
    "http://images.example@127.0.0.1/1.png",
    "http://127.0.0.1@images.example/1.png",
    "http://user:password@images.example/1.png",
    "http://images.example:80@127.0.0.1/1.png",
    "http://127.0.0.1#@images.example/1.png",
    "http://127.0.0.1#.images.example/1.png",
    "http://127.0.0.1?.images.example/1.png",
    "http://127.0.0.1/.images.example/1.png",
    "http://images.example.evil.example/1.png",
    "http://evilimages.example/1.png",
    "http://sub.images.example/1.png",
    "http://images.example./1.png",
    "http://images.example:99999/1.png",
    "http://images.example:0/1.png",
    "http://images.example:/1.png",
    "http://images.example:22/1.png",
    "http://images.example /1.png",
    "http://images.example\t/1.png",
    "http://images.example\r\nHost: internal/1.png",
    "http://images.example/1.png HTTP/1.1\r\nX-Injected: 1",
    "http://images.example/1.png\nX-Injected: 1",
    "http://images.example%2eevil.example/1.png",
    "http://images。example/1.png",  # an ideographic full stop, which IDNA reads as a dot
    "http://ⓟictures.example/1.png",
    "http:///1.png",
    "http:images.example/1.png",
    "https:/images.example/1.png",
    "//images.example/1.png",
    " http://images.example/1.png",
    "http://",
    "HTTP://127.0.0.1/1.png",
]


@pytest.mark.parametrize("url", TRICKS)
def test_no_trick_of_spelling_leads_anywhere(web: Web, url: str):
    web.addresses |= {host: [PUBLIC] for host in ("localhost", "evil.example", "127.0.0.1")}
    error = refusal(web, url)
    assert (error.status, error.code) == (400, "image_refused")
    assert (web.looked_up, web.connected) == ([], [])
    assert is_web_url(url)


NO_HOSTS = [
    "127.0.0.1", "2130706433", "0x7f000001", "[::1]", "*.example", "*", "", "a b", "example:port", "images.example:0",
    "http://images.example", "user@images.example", "images.example/",
]  # fmt: skip


def test_the_list_names_hosts_and_no_addresses_or_patterns():
    for domain in NO_HOSTS:
        with pytest.raises(ConfigError, match="--allow-media-domain"):
            Fetcher((domain,), 5, 1000)


INTERNAL = [
    "127.0.0.1", "127.255.255.254", "10.0.0.5", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.127.255.255", "0.0.0.0", "0.1.2.3", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fd12::1", "ff02::1", "ff0e::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "192.88.99.1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "::127.0.0.1", "no address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", INTERNAL)
def test_an_allowed_name_that_leads_inside_is_not_followed(web: Web, address: str):
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):  # one that is not public spoils all
        web.addresses["images.example"] = addresses
        assert refusal(web, "http://images.example/1.png").code == "image_refused"
    assert web.connected == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_followed(web: Web, address: str):
    web.addresses["images.example"] = [address]
    assert web.fetch("http://images.example/1.png") == IMAGE
    assert web.connected == [(address, 80)]


def test_a_name_that_changes_its_address_is_looked_up_once(web: Web):
    """DNS rebinding: the second answer would be an address inside."""
    answers = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    web.resolve = lambda host, port: web.looked_up.append(host) or next(answers)  # type: ignore[method-assign,func-returns-value]
    assert web.fetch("http://images.example/1.png") == IMAGE
    assert web.looked_up == ["images.example"]
    assert web.connected == [(PUBLIC, 80)]


def test_a_connection_that_ends_is_not_opened_again_by_name(web: Web, monkeypatch: pytest.MonkeyPatch):
    """http.client would connect anew, by itself and to any address."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up a second time"))
    web.handle = lambda connection: connection.shutdown(socket.SHUT_RDWR)
    assert refusal(web, "http://images.example/1.png").status == 502


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["http://127.0.0.1/1.png", "http://images.example/2.png", "file:///etc/passwd"])
def test_no_redirect_is_followed(web: Web, status: int, target: str):
    answer = f"HTTP/1.1 {status} Moved\r\nLocation: {target}\r\nContent-Length: 7\r\n\r\npicture"
    web.handle = lambda connection: connection.sendall(answer.encode())
    error = refusal(web, "http://images.example/1.png")
    assert (error.status, error.code) == (502, "image_not_fetched")
    assert len(web.requests) == 1


SLOW: dict[str, tuple[bytes, bytes]] = {  # sent at once, then again and again
    "nothing": (b"", b""),
    "headers one byte at a time": (b"", b"H"),
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "a body one byte at a time": (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"x"),
    "chunks one byte at a time": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_answers_are_cut_off_in_time(web: Web, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "LAST_RESORT_SECONDS", 60.0)  # so what cuts them off is not that
    first, then = SLOW[name]

    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(800):
            connection.sendall(then)
            time.sleep(0.05)

    web.handle = drip
    started = time.monotonic()
    error = refusal(web, "http://images.example/1.png", seconds=0.5)
    assert error.status == 502
    assert time.monotonic() - started < 20


LARGE: dict[str, bytes] = {
    "announced": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "without end": b"HTTP/1.1 200 OK\r\n\r\n",
    "in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("name", LARGE)
def test_large_answers_are_cut_off(web: Web, name: str):
    sent = 0

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(LARGE[name])
        part = b"3e8\r\n" + b"x" * 1000 + b"\r\n" if name == "in chunks" else b"x" * 1000
        while True:
            sent += connection.send(part)

    web.handle = pour
    error = refusal(web, "http://images.example/1.png", max_bytes=2000)
    assert (error.status, error.message) == (502, "image_url: the image is larger than 2,000 bytes")
    assert sent < 20_000_000  # what loopback buffers


def test_an_answer_that_is_cut_short_is_no_image(web: Web):
    web.handle = lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\npic")
    assert refusal(web, "http://images.example/1.png").status == 502


OTHER = [b"HTTP/1.1 404 Not Found\r\n\r\n", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500]


@pytest.mark.parametrize("answer", OTHER)
def test_other_answers_are_no_image(web: Web, answer: bytes):
    web.handle = lambda connection: connection.sendall(answer)
    assert refusal(web, "http://images.example/1.png").status == 502


def test_an_unknown_name_is_told_apart_from_a_refused_one(web: Web):
    web.addresses.clear()
    assert (
        refusal(web, "http://images.example/1.png").message
        == "image_url: the image could not be fetched: its host was not found"
    )


def test_the_next_address_is_tried_when_one_does_not_answer(web: Web):
    connect = web.connect

    def flaky(address: str, port: int, seconds: float) -> socket.socket:
        if address == PUBLIC:
            web.connected.append((address, port))
            raise ConnectionRefusedError
        return connect(address, port, seconds)

    web.connect = flaky  # type: ignore[method-assign]
    web.addresses["images.example"] = [PUBLIC, "8.8.8.8"]
    assert web.fetch("http://images.example/1.png") == IMAGE
    assert web.connected == [(PUBLIC, 80), ("8.8.8.8", 80)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key for images.example, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command, *subject], cwd=folder, check=True, capture_output=True)
    return folder


def test_https_checks_the_certificate_of_the_name_at_the_pinned_address(web: Web, certificate: Path):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    names: list[str | None] = []
    server.sni_callback = lambda _, name, __: names.append(name)
    web.context = server
    trusting = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    web.addresses["other.example"] = [PUBLIC]

    assert web.fetch("https://images.example/1.png", context=trusting) == IMAGE
    assert names == ["images.example"]
    assert web.connected == [(PUBLIC, 443)]
    assert b"Host: images.example\r\n" in web.requests[0]
    for url, context in (("https://other.example/1.png", trusting), ("https://images.example/1.png", None)):
        with pytest.raises(ApiError) as caught:  # another name; a signer that is not trusted
            web.fetch(url, "images.example", "other.example", context=context)
        assert caught.value.status == 502


def test_fragments_are_not_sent():
    target = parse_url("http://images.example/a#b")
    assert target is not None
    assert target.path == "/a"
