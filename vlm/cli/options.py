"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ImageOrderOption = Annotated[
    Literal["auto", "first", "last", "keep"],
    typer.Option(
        "--image-order",
        help="Images before or after words, or as they come; auto: as in training. 图片在文字前、后或按原顺序。",
    ),
]

AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="Add this LoRA: a folder that peft wrote, or another export. 加上此 LoRA（peft 文件夹或另一个导出）。",
    ),
]
BitsOption = Annotated[
    int | None,
    typer.Option("--bits", help="8 or 4, of the language model's weights, by bitsandbytes. 8 或 4 位量化。"),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--prompt-template", help="Chat template instead of the model's. 替换模型自带的对话模板。"),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
MODEL_HELP = "An export, or a model folder of transformers. 导出的模型，或 transformers 模型文件夹。"


def image_order_of(
    option: Literal["auto", "first", "last", "keep"],
) -> Literal["first", "last", "keep"] | None:
    """As `vlm.load` takes it."""
    return None if option == "auto" else option
