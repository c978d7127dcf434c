"""Connections that cannot be held open for nothing: uvicorn's own have no time limit before their first request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # for the header of a request, from the connection or from the header's first byte
MAX_CONNECTIONS = 512  # half of the files that a process may usually open


class Connection(H11Protocol):
    """HTTP/1.1 with a limit on the time that a header takes, and on the number of connections."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            transport.abort()
            return
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport is None:  # was refused
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._waited()
        elif before is None or before.response_complete:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waited()
        if self.transport is not None:
            super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _waited(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
