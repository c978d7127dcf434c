"""Where a page may be served. Light: the command checks this before anything is loaded."""

from __future__ import annotations

import errno
import socket

from vlm.errors import ConfigError


def choose_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError when it is in use or may not be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that just ended does not count
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(f"port {port} may not be taken by this user; name one above 1023, or --port 0") from None
        except socket.gaierror:
            raise ConfigError(f"--host {host} is no address of this machine") from None
        except OverflowError:
            raise ConfigError(f"port {port} is out of range 0..65535") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--host {host} is no address of this machine") from None
            raise ConfigError(in_use(port)) from None
        return int(probe.getsockname()[1])


def is_loopback(host: str) -> bool:
    """
    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.0.2")]
    [True, True, True, False, False]
    """
    return host in ("localhost", "::1") or host.startswith("127.")


def in_use(port: int) -> str:
    return f"port {port} is in use. Name another one with --port, or --port 0 for any free one"
