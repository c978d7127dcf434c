"""`vlm import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import CheckpointError


def register(app: typer.Typer) -> None:
    app.command(name="import")(import_model)


def import_model(
    folder: Annotated[
        Path,
        typer.Argument(
            help="LLaVA (transformers', official), TinyLLaVA, prismatic or XTuner. 其他程序训练的模型文件夹。"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Where the export goes. 输出文件夹。")],
    llm: Annotated[
        str | None, typer.Option(help="Base language model, if the folder has none in it. 基础语言模型。")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision encoder, if the folder has none in it. 视觉编码器。")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template; default: what such models are trained with. 对话模板。")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 2GB. 单个权重文件的上限。")] = "5GB",
) -> None:
    """Turn another program's VLM into an export, to chat with and to train on. 导入其他程序训练的模型，可继续训练。"""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Name a model that lies on this disk")
    from vlm.export.taken_in import import_folder

    print(import_folder(folder, out, llm=llm, vision=vision, template=template, max_shard_size=max_shard_size))
