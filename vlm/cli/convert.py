"""`vlm convert`: models of other programs and other times, as folders that everything here loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def convert() -> None:
    """Write a model in a layout that is loaded without code of its own."""


@app.command()
def legacy(
    folder: Annotated[Path, typer.Argument(help="A Qwen 1, InternLM 1 or 2, Baichuan, XVERSE or ChatGLM folder.")],
    out: Annotated[Path, typer.Argument(help="Where the native model goes; a new folder.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, and about the memory it takes.")] = "5GB",
) -> None:
    """Rewrite a model that needed its own Python code as one that transformers has a class for."""
    from vlm.artifacts.legacy import convert_legacy

    print(convert_legacy(folder, out, max_shard_size))
