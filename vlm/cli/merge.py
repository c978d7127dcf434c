"""`vlm merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm.errors import CheckpointError, ConfigError


def register(app: typer.Typer) -> None:
    app.command()(merge)


def merge(
    base: Annotated[Path, typer.Argument(help="A model folder in transformers' layout. 基础模型文件夹。")],
    adapter: Annotated[
        str, typer.Argument(help="A LoRA folder of peft, or an export with one; FOLDER=0.3 weighs it. LoRA 文件夹。")
    ],
    out: Annotated[Path, typer.Argument(help="Where it goes. 输出文件夹。")],
    more: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="One more to add, FOLDER or FOLDER=0.3. Repeatable. 再加一个，可多次给出。"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "fp16", "bf16", "fp32"], typer.Option(help="Of the weights; auto: the base's. 权重精度。")
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, and so the memory it takes. 单个权重文件的上限。")
    ] = "5GB",
    device: Annotated[str, typer.Option(help="Where sums are computed: auto, cpu, cuda. 设备。")] = "auto",
) -> None:
    """Add LoRA adapters to a model's weights: a folder that loads as the base model does. 合并 LoRA 到基础模型。"""
    if not base.is_dir():
        raise CheckpointError(f"{base} is not a folder. Name a model that lies on this disk")
    given = [weighed(text) for text in (adapter, *(more or ()))]
    from vlm.artifacts.peft_adapter import read_peft
    from vlm.export.merge import merge_folder

    adapters = [read_peft(folder, weight) for folder, weight in given]
    merge_folder(base, adapters, out, dtype=dtype, device=device, max_shard_size=max_shard_size)
    print(out)


def weighed(text: str) -> tuple[Path, float]:
    """FOLDER=WEIGHT. A folder whose own name has the sign counts as one.

    Raises:
        CheckpointError: it is not there.
        ConfigError: the weight is not a number.
    """
    folder, sign, weight = text.rpartition("=")
    if not sign or Path(text).is_dir():
        folder, weight = text, "1"
    if not Path(folder).is_dir():
        raise CheckpointError(f"--adapter {folder} is not a folder. Name the one that peft's save_pretrained wrote")
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise ConfigError(f"--adapter {text}: expected FOLDER or FOLDER=NUMBER, such as {folder}=0.3") from None
