"""`vlm adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    app.command()(adopt)


def adopt(
    encoder: Annotated[str, typer.Argument(help="A vision encoder: a folder, or a name. 视觉编码器。")],
    llm: Annotated[str, typer.Argument(help="A language model: a folder, or a name. 语言模型。")],
    folder: Annotated[Path, typer.Argument(help="Where the project goes; a new folder. 新项目的文件夹。")],
    fuse_with: Annotated[
        list[str] | None, typer.Option(help="One more encoder, joined by channel. Repeatable. 再加一个编码器。")
    ] = None,
    backend: Annotated[
        Literal["hf", "open_clip", "timm"] | None, typer.Option(help="The encoder's library. 编码器所属的库。")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's weight tag or file; timm's file. 权重标签或文件。")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template; default: what the tokenizer asks for. 对话模板。")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of the GPU to train on, e.g. 24GiB; default: what is here. 显存。")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A data file for both stages. 数据文件。")] = None,
    images: Annotated[str | None, typer.Option(help="The folder of its images. 图片文件夹。")] = None,
) -> None:
    """Write a project for an encoder and a language model, and say what the two can do. 为新组合生成项目。"""
    from vlm.adopt.adopt import adopt as write
    from vlm.adopt.adopt import as_text

    adopted = write(
        [encoder, *(fuse_with or ())], llm, folder, backend=backend, pretrained=pretrained, template=template,
        memory=memory, data=data, images=images,
    )  # fmt: skip
    print(as_text(adopted))
