"""`vlm convert legacy` and `vlm prepare-base-model`: models of other times, and base models, made ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.command("prepare-base-model")(prepare_base_model)


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


def prepare_base_model(
    folder: Annotated[Path, typer.Argument(help="A base model that model.llm.path takes.")],
    out: Annotated[Path, typer.Argument(help="Where the prepared model goes; a new folder.")],
    template: Annotated[str, typer.Option(help="Chat template whose control tokens are added.")] = "chatml",
    pad_vocab_to_multiple_of: Annotated[int, typer.Option(min=1, help="Rows of the embedding.")] = 128,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 2GB.")] = "5GB",
) -> None:
    """Add a chat template's control tokens and the image token to a base model. The same call again changes nothing."""
    from vlm.artifacts.prepared_base import prepare_base_model

    print(prepare_base_model(folder, out, template, pad_vocab_to_multiple_of, max_shard_size))
