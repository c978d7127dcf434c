"""`vlm ckpt ls | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import CheckpointError

app = typer.Typer(no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")]


@app.command()
def ls(run: Run) -> None:
    """List the checkpoints of a run, oldest first, each verified."""
    from vlm.train.checkpoint import list_checkpoints

    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoints")
    for info in found:
        size = sum(path.stat().st_size for path in info.path.rglob("*") if path.is_file())
        print(f"{info.path.name}  {size / 2**20:9.1f} MiB  {'; '.join(info.problems) or 'intact'}")


@app.command()
def verify(run: Run) -> None:
    """Compare every file with its manifest. Exit code 5 when one differs."""
    from vlm.train.checkpoint import list_checkpoints
    from vlm.train.checkpoint import verify as verify_one

    if (run / "checkpoints").is_dir():
        problems = [f"{info.path.name}: {text}" for info in list_checkpoints(run) for text in info.problems]
    else:
        problems = verify_one(run)
    if problems:
        raise CheckpointError(f"{run}:\n  " + "\n  ".join(problems))
    print(f"{run}: intact")
