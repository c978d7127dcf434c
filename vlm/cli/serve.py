"""`vlm serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import CheckpointError, ConfigError, MissingPackageError


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    export: Annotated[Path, typer.Argument(help="An export folder.")],
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="VLM_API_KEY", help="Clients must send it. Repeatable; the variable hides it from ps."),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="As clients name it; default: after the run.")] = None,
    media_root: Annotated[Path | None, typer.Option(help="Let requests name pictures below this folder.")] = None,
    allow_media_domain: Annotated[
        list[str] | None, typer.Option(help="Let requests name pictures at this host, HOST or HOST:PORT. Repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let web pages of this origin call the server. Repeatable.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, max=1024, help="Replies written at the same time.")] = 8,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 503.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the cache for all replies; 0: a quarter of the free memory.")
    ] = 0,
    default_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply where a request names none.")] = 512,
    request_seconds: Annotated[float, typer.Option(min=1, help="Time for one request, queue included.")] = 300.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time for running replies after SIGTERM.")] = 60.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request.")] = 32,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for each request.")] = False,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> int:
    """Answer OpenAI's chat API with an export, many chats at once."""
    _check(export, media_root, precision)
    from vlm.chat.api.limits import MIB, Access, Limits, Media
    from vlm.chat.api.server import default_name
    from vlm.chat.api.server import serve as run_server

    def load_model():  # type: ignore[no-untyped-def]
        from vlm.export.load import load

        return load(export, device, precision)  # type: ignore[arg-type]

    return run_server(
        load_model,
        model_name or default_name(export),
        host,
        port,
        limits=Limits(
            max_running=max_running,
            max_queued=max_queued,
            max_tokens=max_tokens,
            default_new_tokens=default_new_tokens,
            request_seconds=request_seconds,
            drain_seconds=drain_seconds,
            body_bytes=max_body_mib * MIB,
            all_bodies_bytes=8 * max_body_mib * MIB,
        ),
        media=Media(media_root, tuple(allow_media_domain or ())),
        access=Access(tuple(api_key or ()), tuple(allow_origin or ())),
        access_log=access_log,
    )


def _check(export: Path, media_root: Path | None, precision: str) -> None:
    """What can be found out before anything heavy is imported."""
    if not export.is_dir():
        raise CheckpointError(f"{export} is no folder. Name an export; `vlm export RUN` writes RUN/export")
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"--precision {precision}: expected auto, fp32 or bf16")
    if media_root is not None and not media_root.is_dir():
        raise ConfigError(f"--media-root {media_root} is no folder")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "vlm serve", "serve")
