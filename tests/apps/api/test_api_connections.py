"""Connections that send nothing, or half a header."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import httpx
import pytest
from api_server import make_service, on_port

from vlm.apps.api import connections
from vlm.inference.load import LoadedModel


def connect(url: str, data: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Reads what is still coming."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("data", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_connection_without_a_whole_header_is_closed(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, data: bytes
):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with on_port(make_service(loaded)) as server, connect(server.url, data) as connection:
        started = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - started > 0.2


@pytest.mark.slow
def test_half_a_header_after_a_whole_request_is_closed_too_and_slow_bodies_are_not(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with on_port(make_service(loaded)) as server:
        with connect(server.url, whole) as connection:
            assert b"200 OK" in connection.recv(1000)
            connection.sendall(whole[:20])
            assert is_closed(connection)
        header = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        with connect(server.url, header + b"Content-Type: application/json\r\n\r\n[") as connection:
            time.sleep(1.5)
            connection.sendall(b"        ")
            assert b"400 Bad Request" in connection.recv(1000)


def test_more_connections_than_allowed_are_closed_at_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with on_port(make_service(loaded)) as server:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connect(server.url))
            assert is_closed(stack.enter_context(connect(server.url)))
        assert httpx.get(f"{server.url}/health").status_code == 200
