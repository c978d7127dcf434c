"""Serve the page: address, password, limits, and an orderly end."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vlm.apps.address import bind, is_loopback
from vlm.apps.web.look import HEAD, theme
from vlm.apps.web.models import ModelStore
from vlm.apps.web.state import MAX_IMAGES
from vlm.apps.web.texts import Language
from vlm.apps.web.uploads import MEGABYTE, Uploads
from vlm.data.records import IMAGE_SUFFIXES
from vlm.errors import ConfigError, MissingPackageError
from vlm.generation.generate import GenerationSettings

if TYPE_CHECKING:
    import gradio as gr

_START_SECONDS = 60.0  # a busy machine takes more than the 5 seconds that gradio gives its server
Example = tuple[str, Path | None]  # a question to click, and its image if it has one

# Environment variables by which gradio would open what this module closes.
_OVERRIDES = ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_ROOT_PATH",
              "GRADIO_NUM_WORKERS", "GRADIO_SSR_MODE", "GRADIO_MCP_SERVER", "GRADIO_WATCH_DIRS")  # fmt: skip


@dataclass(frozen=True)
class WebOptions:
    """How the page is served; see the flags of `vlm webui`."""

    host: str = "127.0.0.1"
    port: int = 7860  # 0: a free one
    auth: tuple[str, str] | None = None
    share: bool = False
    max_file_mb: int = 20
    max_waiting: int = 16
    language: Language | None = None
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    examples: tuple[Example, ...] = ()


@dataclass
class RunningPage:
    """A page that is being served. Its uploads go with it."""

    page: gr.Blocks
    url: str
    folder: Path

    def close(self) -> None:
        try:
            self.page.server.config.timeout_graceful_shutdown = 1  # second; every open page holds a connection
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would tell of each that is cut
            self.page.close(verbose=False)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def serve(models: ModelStore, options: WebOptions) -> RunningPage:
    """Start serving the chat; returns once the page answers. Raises as `serve_page`."""

    def build(uploads: Uploads) -> gr.Blocks:
        from vlm.apps.web.page import build_page

        examples = _copied(options.examples, uploads.folder / "examples", uploads)
        return build_page(models, uploads, options.language, options.settings, examples, options.max_waiting)

    return serve_page(build, options, HEAD)


def serve_page(
    build: Callable[[Uploads], gr.Blocks], options: WebOptions, head: str, inner: Callable[[Any], Any] | None = None
) -> RunningPage:
    """Start serving a page; returns once it answers.

    Args:
        build: makes the page, once gradio may be imported.
        head: put into the page before anything of gradio's runs.
        inner: wraps the app between the guard and gradio.

    Raises:
        ConfigError: the port is in use or may not be taken.
        MissingPackageError: gradio is not installed.
    """
    listener = bind(options.host, options.port)
    folder = Path(tempfile.mkdtemp(prefix="vlm-webui-")).resolve()
    try:
        page = _launch(build, options, listener, folder, head, inner)
    except BaseException:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return RunningPage(page, _url(options.host, listener), folder)


def run_web(models: ModelStore, options: WebOptions) -> None:
    """What `vlm webui` does: serve until Ctrl-C or SIGTERM. Raises as `serve`."""
    shown = models.labels
    greeting = f"Models: {', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}\nOpen {{url}}   Ctrl-C ends it."
    run_until_ended(lambda: serve(models, options), greeting)


def run_until_ended(start: Callable[[], RunningPage], greeting: str) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises as `serve_page`.

    Args:
        greeting: printed once the page answers, with its address for `{url}`.
    """
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        running = start()
        try:
            print(greeting.replace("{url}", running.url), flush=True)
            ended.wait()
            print("stopped", flush=True)
        finally:
            running.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_examples(folder: Path) -> list[Example]:
    """Images of a folder by name, each asked the text of the .txt beside it, or "What is this?".

    Raises:
        ConfigError: the folder is missing or holds no images.
    """
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not images:
        raise ConfigError(f"--examples {folder}: no folder with images ({' '.join(IMAGE_SUFFIXES)})")
    asked: list[Example] = []
    for image in images[:8]:
        text = image.with_suffix(".txt")
        question = text.read_text(encoding="utf-8").strip() if text.is_file() else "What is this?"
        asked.append((question, image.resolve()))
    return asked


def _launch(
    build: Callable[[Uploads], gr.Blocks], options: WebOptions, listener: socket.socket, folder: Path, head: str,
    inner: Callable[[Any], Any] | None,
) -> gr.Blocks:  # fmt: skip
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when components are made and when the app is
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio.http_server
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingPackageError("gradio", "the browser chat", "serve") from None
    gradio.http_server.start_server = partial(_start_server, listener, _url(options.host, listener))
    uploads = Uploads(folder)
    page = build(uploads)
    max_file_size = options.max_file_mb * MEGABYTE
    local_only = is_loopback(options.host) and not options.share
    page.launch(
        auth=options.auth,
        share=options.share,
        max_file_size=max_file_size,
        app_kwargs=_app_options(uploads, local_only, max_file_size, head, inner),
        prevent_thread_lock=True,
        quiet=not options.share,  # else the public address is printed
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        num_workers=0,
        state_session_capacity=1000,
        theme=theme(),
    )
    return page


def _start_server(listener: socket.socket, url: str, app: Any, **_: Any) -> tuple[str, int, str, Any]:
    """In place of gradio's, which lets go of the port before it serves, asks whether it is free on 127.0.0.1 whatever
    the host, and waits 5 seconds, too few on a busy machine.

    Returns:
        as gradio's: host, port, address and server.
    """
    import uvicorn
    from gradio.http_server import Server

    server = Server(uvicorn.Config(app, log_level="warning"))
    server.thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    server.thread.start()
    end = time.monotonic() + _START_SECONDS
    while not server.started:
        if not server.thread.is_alive() or time.monotonic() > end:
            raise RuntimeError("the page's server did not start; its log above says why")
        time.sleep(0.01)
    host, port = listener.getsockname()[:2]
    return host, port, url, server


def _url(host: str, listener: socket.socket) -> str:
    name = "localhost" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"


def _copied(examples: Sequence[Example], folder: Path, uploads: Uploads) -> list[Example]:
    """Beside the uploads, where the browser learns nothing of this machine's folders."""
    folder.mkdir()
    copied: list[Example] = []
    for number, (question, image) in enumerate(examples, 1):
        copy = None
        if image is not None:
            copy = folder / f"example-{number}{image.suffix.lower()}"
            shutil.copyfile(image, copy)
            uploads.share(str(copy))
        copied.append((question, copy))
    return copied


def _app_options(
    uploads: Uploads, local_only: bool, max_file_size: int, head: str, inner: Callable[[Any], Any] | None
) -> dict[str, Any]:
    from starlette.middleware import Middleware

    from vlm.apps.web.guard import Guard

    guard: Any = Guard
    limits = {"max_file_size": max_file_size, "max_body": MAX_IMAGES * max_file_size + MEGABYTE}
    middleware = [Middleware(guard, uploads=uploads, local_only=local_only, head=head, **limits)]
    if inner is not None:
        middleware.append(Middleware(inner))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.uploaded_file_dir = uploads  # gradio asks it at each upload where to write
        yield

    hidden = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    return {"middleware": middleware, "lifespan": lifespan, **hidden}
