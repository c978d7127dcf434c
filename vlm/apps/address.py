"""Where the browser chat and the API may listen. Light: commands check this before anything is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket

from vlm.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server bound to `host`.

    >>> [is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost")]
    [True, True, True, True]
    >>> [is_loopback(host) for host in ("127.lan.example", "0.0.0.0", "::", "", "192.168.0.2")]
    [False, False, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(host: str) -> str:
    """What a Host header names, without the port.

    >>> [host_name(host) for host in ("localhost:8000", "[::1]:8000", "127.0.0.1")]
    ['localhost', '::1', '127.0.0.1']
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: in use, not allowed, or no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigError(f"--host {host} is no address of this machine; 127.0.0.1 is for this machine only") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # taken now: another program cannot, while the model is loaded
    except OSError as error:
        listener.close()
        raise ConfigError(_why_not(host, port, error)) from None
    return listener


def choose_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises as `bind`."""
    with bind(host, port) as listener:
        return int(listener.getsockname()[1])


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; choose another with --port, or --port 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; choose one above 1023 with --port"
    return f"cannot listen at {host}:{port} ({error.strerror}); --host 127.0.0.1 always works"
