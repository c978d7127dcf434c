"""`vlm webui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm.cli.options import ImageOrderOption, TemplateOption, image_order_of
from vlm.errors import CheckpointError, ConfigError

DEFAULT_RUNS = Path("cache/runs")


def register(app: typer.Typer) -> None:
    app.command()(webui)


def webui(
    export: Annotated[
        Path | None,
        typer.Argument(
            help="An export or model folder; without one, all below --runs. 模型文件夹；不给则用 --runs 下的全部。"
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="Offer all exports below this folder too. 同时列出此文件夹下的所有模型。")
    ] = DEFAULT_RUNS,
    host: Annotated[
        str, typer.Option(help="Other than loopback needs --auth. 监听地址；非本机地址需要 --auth。")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one. 端口，0 为任意空闲端口。")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(envvar="VLM_WEBUI_AUTH", help="user:password that the page asks for. 登录所需的 用户名:密码。"),
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Serve a network without --auth. 允许网络访问而不设密码。")
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="A public address through gradio.live. Needs --auth. 生成公网地址，需要 --auth。"),
    ] = False,
    max_file_size: Annotated[int, typer.Option(min=1, max=1000, help="MB of one image. 单张图片的上限（MB）。")] = 20,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Questions that wait; more are refused. 排队问题的上限，超出则拒绝。")
    ] = 16,
    max_loaded: Annotated[int, typer.Option(min=1, help="Models in memory at once. 内存中同时保留的模型数。")] = 1,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Images to click, each with a .txt of the question if any. 示例图片文件夹，同名 .txt 为问题。"
        ),
    ] = None,
    language: Annotated[
        Literal["auto", "en", "zh"], typer.Option(help="auto is the browser's. 界面语言，auto 跟随浏览器。")
    ] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="First value in the panel. 面板中回答长度的初始值。")
    ] = 256,
    image_order: ImageOrderOption = "auto",
    adapter: Annotated[
        Path | None,
        typer.Option(help="Offer EXPORT with this LoRA too, to compare. 同时提供加上此 LoRA 的模型，便于比较。"),
    ] = None,
    prompt_template: TemplateOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda. 设备。")] = "auto",
) -> None:
    """Chat in the browser. 在浏览器中与模型对话。"""
    if export is not None and not export.is_dir():
        raise CheckpointError(f"{export} is no folder. Name an export; `vlm export RUN` writes RUN/export")
    login = _login(host, auth, allow_anyone, share)
    from vlm.apps.address import choose_port

    choose_port(host, port)  # before anything heavy
    from vlm.apps.web.app import WebOptions, find_examples, run_web
    from vlm.apps.web.models import ModelStore, find_exports
    from vlm.artifacts.plain import read_model
    from vlm.generation.generate import GenerationSettings

    if export is not None:
        read_model(export)
    elif adapter is not None:
        raise ConfigError("--adapter is added to one model: name its folder, vlm webui EXPORT --adapter LORA")
    found = find_exports(export, runs, adapter)
    if not found:
        raise CheckpointError(
            f"no export below {runs}. `vlm export RUN` writes one; or name a folder: vlm webui EXPORT"
        )
    options = WebOptions(
        host=host,
        port=port,
        auth=login,
        share=share,
        max_file_mb=max_file_size,
        max_waiting=max_waiting,
        language=None if language == "auto" else language,
        settings=GenerationSettings(max_new_tokens=max_new_tokens),
        examples=tuple(find_examples(examples)) if examples is not None else (),
    )
    order = image_order_of(image_order)
    run_web(ModelStore(found, device, max_loaded, image_order=order, template=prompt_template), options)


def _login(host: str, auth: str | None, allow_anyone: bool, share: bool) -> tuple[str, str] | None:
    """User and password. Raises ConfigError when the page would be open to a network without one."""
    from vlm.apps.address import is_loopback

    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise ConfigError("--auth takes user:password, neither of them empty")
        return user, password
    if share:
        raise ConfigError("--share makes a public address: it needs --auth user:password")
    if not is_loopback(host) and not allow_anyone:
        raise ConfigError(
            f"--host {host} opens the page to the network: it needs --auth user:password, or --allow-anyone"
        )
    return None
