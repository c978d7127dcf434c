"""`vlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import CheckpointError


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Argument(help="Where it goes; default: RUN/export, or RUN/export-full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Write everything merged, not only what trained.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 2GB.")] = "5GB",
) -> None:
    """Write the newest checkpoint of a run in the form that chat, serving and the next stage load."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it holds no config.yaml. Name the output_dir of a training run")
    from vlm.export.weights import export_run

    print(export_run(run, out, full=full, max_shard_size=max_shard_size))
