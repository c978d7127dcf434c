"""`vlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlm.errors import CheckpointError, ConfigError


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Argument(help="Where it goes; default: RUN/export, or RUN/export-full.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Write everything merged, not only what trained.")] = False,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest weight file, such as 2GB.  [5GB]")] = None,
    format: Annotated[
        Literal["safetensors", "pth"], typer.Option(help="pth: one pickled file of tensors, for other tools.")
    ] = "safetensors",
) -> None:
    """Write the newest checkpoint of a run in the form that chat, serving and the next stage load."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it holds no config.yaml. Name the output_dir of a training run")
    if format == "pth":
        if max_shard_size is not None:
            raise ConfigError("--max-shard-size does not go with --format pth, which writes one file: drop one")
        from vlm.export.pth import export_pth

        print(export_pth(run, out, full=full))
        return
    from vlm.export.run import export_run

    print(export_run(run, out, full=full, max_shard_size=max_shard_size or "5GB"))
