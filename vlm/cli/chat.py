"""`vlm chat`, and the mains of cli_demo.py and webui_demo.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import CheckpointError, ConfigError


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    export: Annotated[Path, typer.Argument(help="An export folder.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture. Repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 256,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --do-sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="With --do-sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --do-sample; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.1)] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Talk to an export: one answer with --prompt, a conversation without."""
    if not export.is_dir():
        raise CheckpointError(f"{export} is no folder. Name an export; `vlm export RUN` writes RUN/export")
    from vlm.chat.terminal import run_terminal
    from vlm.models.generate import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens, do_sample, temperature, top_p, top_k, repetition_penalty, num_beams, seed
    )
    run_terminal(export, image or (), prompt, system, settings, device)


def main_cli_demo() -> None:
    """`python cli_demo.py -c EXPORT [flags of vlm chat]`: asks for a picture, then chats."""
    from vlm.cli.main import app, run, with_hyphens

    def command() -> object:
        parser = argparse.ArgumentParser(
            prog="cli_demo.py", description="Chat in the terminal; `vlm chat -h` lists the other flags."
        )
        parser.add_argument("-c", "--checkpoint-path", required=True, help="an export folder")
        parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
        known, rest = parser.parse_known_args(with_hyphens(sys.argv[1:]))
        device = ["--device", "cpu"] if known.cpu_only else []
        return app(["chat", known.checkpoint_path, *device, *rest], standalone_mode=False)

    sys.exit(run(command))


def main_webui_demo() -> None:
    """Not built yet, and says so."""
    from vlm.cli.main import run

    def command() -> None:
        raise ConfigError("the browser chat is not built yet; use python cli_demo.py -c EXPORT, or vlm chat EXPORT")

    sys.exit(run(command))
