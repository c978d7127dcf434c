"""`vlm serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.options import MODEL_HELP, AdapterOption, ImageOrderOption, TemplateOption, image_order_of
from vlm.errors import CheckpointError, ConfigError, MissingPackageError


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    export: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; others than this machine's need --api-key. 监听地址；非本机地址需要 --api-key。"
        ),
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one. 端口，0 为任意空闲端口。")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="VLM_API_KEY",
            help="Clients must send it. Repeatable; the variable hides it from ps. 访问密钥，可多次给出。",
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="As clients name it; default: after the run. 对外的模型名，默认取自训练目录。")
    ] = None,
    media_root: Annotated[
        Path | None, typer.Option(help="Let requests name images below this folder. 允许请求读取此文件夹下的图片。")
    ] = None,
    allow_media_domain: Annotated[
        list[str] | None,
        typer.Option(
            help="Let requests name images at HOST or HOST:PORT. Repeatable. 允许引用此主机上的图片，可多次给出。"
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages of this origin call the server. Repeatable. 允许此来源的网页访问，可多次给出。"
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, max=1024, help="Replies written at the same time. 同时生成的回答数。")
    ] = 8,
    max_queued: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more get 503. 排队请求的上限，超出返回 503。")
    ] = 32,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens of the cache for all replies; 0: a quarter of the free memory. 缓存词元总数。",
        ),
    ] = 0,
    default_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest reply where a request names none. 请求未指定时回答的最大长度。")
    ] = 512,
    request_seconds: Annotated[
        float, typer.Option(min=1, help="Time for one request, queue included. 单个请求的时限（秒），含排队。")
    ] = 300.0,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="Time for running replies after SIGTERM. 收到 SIGTERM 后留给未完成回答的时间（秒）。"),
    ] = 60.0,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request. 单个请求的最大体积（MiB）。")] = 32,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line for each request. 每个请求记一行日志。")
    ] = False,
    image_order: ImageOrderOption = "auto",
    adapter: AdapterOption = None,
    prompt_template: TemplateOption = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16. 计算精度。")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. 设备。")] = "auto",
) -> int:
    """Answer OpenAI's chat API with an export, many chats at once. 提供兼容 OpenAI 的对话接口，可同时服务多个对话。"""
    _check(export, media_root, precision)
    from vlm.apps.api.limits import MIB, Access, Limits, Media
    from vlm.apps.api.server import default_name
    from vlm.apps.api.server import serve as run_server

    def load_model():  # type: ignore[no-untyped-def]
        from vlm.inference.load import load

        settings = {"adapter": adapter, "template": prompt_template, "image_order": image_order_of(image_order)}
        return load(export, device, precision, **settings)  # type: ignore[arg-type]

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
