"""An export behind a port, until a signal ends it."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from vlm.apps.address import bind
from vlm.apps.api.app import build_app
from vlm.apps.api.connections import Connection
from vlm.apps.api.guard import check_access
from vlm.apps.api.limits import Access, Limits, Media
from vlm.apps.api.media import MediaLoader
from vlm.apps.api.metrics import Metrics
from vlm.apps.api.scheduler import Scheduler
from vlm.apps.api.service import Service
from vlm.errors import ConfigError
from vlm.generation.batched import BatchedGenerator
from vlm.generation.slot_cache import CELLS
from vlm.inference.budget import fitting_tokens
from vlm.inference.load import LoadedModel
from vlm.logs import log

_CUT_SECONDS = 3  # for connections to close once replies have ended


def serve(
    load_model: Callable[[], LoadedModel],
    name: str,
    host: str,
    port: int,
    *,
    limits: Limits,
    media: Media,
    access: Access,
    access_log: bool = False,
) -> int:
    """Load a model and answer requests until SIGTERM or Ctrl-C.

    On the first signal replies that are being written are finished and new requests get 503; on a second, or after
    `limits.drain_seconds`, the rest is cut off.

    Returns:
        the exit code: 0 if every reply was finished, else 143 (SIGTERM) or 130 (Ctrl-C).

    Raises:
        ConfigError: the port cannot be had, the server would be open to others without a key, or `limits.max_tokens`
            is too small; before the model is loaded.
    """
    check_access(host, access)
    check_budget(limits)
    loader = MediaLoader(media)
    listener = bind(host, port)
    with listener:
        loaded = load_model()
        log(f"{name}: {loaded.describe_compute()}")
        service = build_service(loaded, name, loader, limits)
        config = uvicorn.Config(
            build_app(service, access),
            http=Connection,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            timeout_graceful_shutdown=_CUT_SECONDS,
            server_header=False,
            proxy_headers=False,
        )
        server = _Server(config, service, listener)
        try:
            server.run(sockets=[listener])
        finally:
            service.scheduler.stop()
    return server.exit_code


def build_service(loaded: LoadedModel, name: str, media: MediaLoader, limits: Limits) -> Service:
    """The parts of a server, put together; nothing runs yet."""
    generator = BatchedGenerator(
        loaded.model,
        max_running=limits.max_running,
        max_tokens=limits.max_tokens or fitting_tokens(loaded, limits.max_running),
    )
    scheduler = Scheduler(generator, loaded.autocast)
    return Service(loaded, name, scheduler, media, Metrics(scheduler), limits)


def check_budget(limits: Limits) -> None:
    """
    Raises:
        ConfigError: `limits.max_tokens` holds no conversation.
    """
    if 0 < limits.max_tokens < CELLS:
        raise ConfigError(
            f"--max-tokens {limits.max_tokens}: expected at least {CELLS}, as the cache grows by that many tokens; "
            "0 fits it to the memory"
        )


class _Server(uvicorn.Server):
    """uvicorn that finishes what is being written before it closes its port."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._service = service
        self._listener = listener
        self._drain_until = 0.0
        self._signal = 0  # the last one

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {self._service.name} at {url}/v1 (documentation: {url}/docs)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signal = sig
        if not self._service.draining:
            self._service.draining = True
            self._drain_until = time.monotonic() + self._service.limits.drain_seconds
            if self._service.num_open:
                log(f"finishing {self._service.num_open} requests; another signal cuts them off")
        else:
            self._drain_until = 0.0

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self.should_exit:
            if self._service.num_open and time.monotonic() > self._drain_until:
                self.exit_code = 130 if self._signal == signal.SIGINT else 143
                self._service.cut()
                self.should_exit = True
            elif not self._service.num_open:
                self.should_exit = True
        return await super().on_tick(counter)


def default_name(export: Path) -> str:
    """PROJECT-RUN for an export in its usual place, else the name of its folder.

    >>> default_name(Path("cache/runs/quickstart/finetune/export"))
    'quickstart-finetune'
    """
    folder = export.resolve()
    if folder.name != "export":
        return folder.name
    run = folder.parent
    return f"{run.parent.name}-{run.name}" if run.parent.name not in ("", "runs") else run.name
