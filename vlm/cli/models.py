"""`vlm models`: families of language models, without importing torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlm.cli.options import AsJson
from vlm.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command()(models)


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, a model type or a template, such as qwen.")] = "",
    every_type: Annotated[bool, typer.Option("--all", help="Every model type that was measured.")] = False,
    as_json: AsJson = False,
    as_table: Annotated[bool, typer.Option("--markdown", help="As the table of docs/families.md.")] = False,
) -> None:
    """List families of language models: class, chat template, LoRA targets, pipeline, and how each is proven."""
    from vlm.models.known import as_markdown, as_text, describe, num_unnamed

    entries = describe(pattern, every_type)
    if not entries:
        raise ConfigError(f"no family matches {pattern!r}; vlm models lists them, and --all the other model types")
    if as_json:
        print(json.dumps(entries, indent=2, ensure_ascii=False))
    elif as_table:
        print(as_markdown(entries), end="")
    else:
        print(as_text(entries))
        if not every_type and not pattern:
            print(f"{num_unnamed()} more model types were measured: vlm models --all, docs/models.md")
