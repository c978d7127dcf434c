"""Images from the web, for a server that was told which hosts may be asked.

What a URL says must never decide where this machine connects. So: one parser, which knows one plain form and refuses
the rest; the host must be on the list; its name is looked up once, all its addresses must be public, and the connection
goes to an address that was checked. Redirects are not followed. Size and time are bounded whatever the other side does.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlm.apps.api.errors import ApiError
from vlm.errors import ConfigError

Resolve = Callable[[str, int], list[str]]  # host and port -> its addresses
Connect = Callable[[str, int, float], socket.socket]  # address, port, seconds -> an open connection

LAST_RESORT_SECONDS = 1.0  # looking a name up cannot be interrupted: its thread is left behind then
_PORTS = {"http": 80, "https": 443}
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?!\d+\Z|0x){_LABEL}\Z", re.ASCII)  # ends in a name: no number
_URL = re.compile(r"(https?)://([^/?#\\@\[\]:\s]+)(?::(\d{1,5}))?(/[!-~]*)?", re.ASCII | re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# reserved, though not every version of Python says so
_SPECIAL = [ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10", "64:ff9b:1::/48")]
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Target:
    """A URL, read once."""

    scheme: str
    host: str
    port: int
    path: str  # and query

    @property
    def authority(self) -> str:
        """What the Host header says."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def is_web_url(url: str) -> bool:
    """Whether something is meant as an address on the web, well-formed or not."""
    return re.match(r"\s*(https?:|//|\\\\)", url, re.IGNORECASE) is not None


def parse_url(url: str) -> Target | None:
    """`http(s)://name[:port][/path]` of printable ASCII without user, backslash or numeric host; None for all else.

    >>> parse_url("https://images.example.org/a.png?b=1")
    Target(scheme='https', host='images.example.org', port=443, path='/a.png?b=1')
    >>> parse_url("http://images.example.org\\\\@10.0.0.1/") is None
    True
    """
    found = _URL.fullmatch(url)
    if found is None:
        return None
    scheme, host, port, path = found[1].lower(), found[2].lower(), found[3], found[4] or "/"
    if not _HOST.match(host) or "\\" in path:
        return None
    number = _PORTS[scheme] if port is None else int(port)
    if not 0 < number < 65536:
        return None
    return Target(scheme, host, number, path.partition("#")[0])


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, whatever it is wrapped in.

    >>> [is_public(a) for a in ("93.184.216.34", "127.0.0.1", "100.64.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1")]
    [True, False, False, False, False]
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_private
    return ip.is_global and not special and not any(ip in network for network in _SPECIAL)


def parse_domains(domains: Sequence[str]) -> frozenset[tuple[str, int | None]]:
    """HOST or HOST:PORT of --allow-media-domain; without a port, those of http and https.

    Raises:
        ConfigError: not a plain host name. Addresses and patterns are no names.
    """
    allowed = set()
    for domain in domains:
        host, colon, port = domain.strip().lower().partition(":")
        if not _HOST.match(host) or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
            raise ConfigError(f"--allow-media-domain {domain!r}: expected a host name, e.g. images.example.org")
        allowed.add((host, int(port) if colon else None))
    return frozenset(allowed)


class Fetcher:
    """Fetches images from allowed hosts.

    Args:
        resolve, connect, context: for tests; by default those of the system.
    """

    def __init__(
        self,
        domains: Sequence[str],
        seconds: float,
        max_bytes: int,
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = parse_domains(domains)
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._resolve = resolve or _look_up
        self._connect = connect or _open
        self._context = context
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="fetch") if self._allowed else None

    async def fetch(self, url: str) -> bytes:
        """
        Raises:
            ApiError: 400 the URL or its host is not allowed, or leads to an address that is not public; 502 no image
                came within size and time.
        """
        target = self.check(url)
        assert self._threads is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._seconds + LAST_RESORT_SECONDS):
                return await loop.run_in_executor(self._threads, self._fetch, target)
        except TimeoutError:
            raise _failed("took too long") from None

    def check(self, url: str) -> Target:
        """What may be fetched. Raises ApiError 400."""
        if not self._allowed:
            raise refused("images come as data: URLs; this server fetches nothing (--allow-media-domain)")
        target = parse_url(url)
        if target is None:
            raise refused("this is no plain http(s) URL with a host name")
        usual = target.port == _PORTS[target.scheme]
        if (target.host, target.port) not in self._allowed and not (usual and (target.host, None) in self._allowed):
            raise refused("this host is not among those that the server may ask (--allow-media-domain)")
        return target

    def _fetch(self, target: Target) -> bytes:
        deadline = time.monotonic() + self._seconds
        try:
            addresses = self._resolve(target.host, target.port)
        except OSError:
            raise _failed("could not be fetched: its host was not found") from None
        if not addresses or not all(is_public(address) for address in addresses):
            raise refused("its host is not on the public internet")
        try:
            with self._open_any(target, addresses, deadline) as connection:
                return self._read(target, connection, deadline)
        except (OSError, http.client.HTTPException, ValueError):
            raise _failed("could not be fetched") from None

    def _open_any(self, target: Target, addresses: list[str], deadline: float) -> socket.socket:
        error: OSError = TimeoutError()
        for address in addresses:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._connect(address, target.port, left)
            except OSError as failed:
                error = failed
        raise error

    def _read(self, target: Target, raw: socket.socket, deadline: float) -> bytes:
        """One GET over an open connection, which is cut at the deadline however slowly bytes drip."""
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, (raw,))
        timer.daemon = True
        timer.start()
        try:
            raw.settimeout(self._seconds)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.auto_open = 0  # it must never look the name up and connect by itself
            connection.sock = raw
            if target.scheme == "https":
                context = self._context or ssl.create_default_context()
                # wrapping takes the socket over; a second handle of it stays with the timer
                connection.sock = context.wrap_socket(raw.dup(), server_hostname=target.host)
            plain = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET", target.path, headers={"Host": target.authority, **plain})
            with connection.getresponse() as response:
                if response.status != 200:
                    raise _failed(f"answered with status {response.status}; redirects are not followed")
                return self._read_body(response, deadline)
        finally:
            timer.cancel()

    def _read_body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        if (response.length or 0) > self._max_bytes:
            raise _failed(f"is larger than {self._max_bytes:,} bytes")
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > self._max_bytes:
                raise _failed(f"is larger than {self._max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length or time.monotonic() > deadline:  # cut off before its announced end
            raise TimeoutError
        return bytes(data)


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _open(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=seconds)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def refused(reason: str) -> ApiError:
    """An image that the server's owner did not allow, or that is none."""
    return ApiError(400, f"image_url: {reason}", "image_refused", "messages")


def _failed(reason: str) -> ApiError:
    return ApiError(502, f"image_url: the image {reason}", "image_not_fetched", "messages")
