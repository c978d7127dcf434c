"""`vlm studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm.cli.webui import DEFAULT_RUNS


def register(app: typer.Typer) -> None:
    app.command()(studio)


def studio(
    runs: Annotated[Path, typer.Option(help="Show the runs below this folder. 显示此文件夹下的训练。")] = DEFAULT_RUNS,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one. 端口，0 为任意空闲端口。")] = 7861,
    language: Annotated[
        Literal["auto", "en", "zh"], typer.Option(help="auto is the browser's. 界面语言，auto 跟随浏览器。")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Of the chat: auto, cpu or cuda. 对话所用设备。")] = "auto",
) -> None:
    """Configure, start and watch runs in the browser, on this machine only. 在浏览器中训练（仅限本机）。"""
    from vlm.apps.address import choose_port

    choose_port("127.0.0.1", port)  # before anything heavy
    from vlm.apps.studio.app import run_studio
    from vlm.apps.studio.settings import Studio

    run_studio(Studio(runs, None if language == "auto" else language, device), port)
