"""`vlm ckpt ls | verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.options import AsJson
from vlm.errors import CheckpointError

app = typer.Typer(no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def ls(run: Run, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first, each verified."""
    from vlm.train.checkpoint import list_checkpoints

    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoints; name the output_dir of a run")
    sizes = [sum(path.stat().st_size for path in info.path.rglob("*") if path.is_file()) for info in found]
    if as_json:
        values = [
            {"path": str(info.path), "step": info.step, "bytes": size, "problems": info.problems}
            for info, size in zip(found, sizes, strict=True)
        ]
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for info, size in zip(found, sizes, strict=True):
        print(f"{info.path.name}  {size / 2**20:9.1f} MiB  {'; '.join(info.problems) or 'intact'}")


@app.command()
def verify(run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint.")]) -> None:
    """Compare every file with its manifest. Exit code 5 when one differs."""
    from vlm.train.checkpoint import list_checkpoints
    from vlm.train.checkpoint import verify as verify_one

    if not run.is_dir():
        raise CheckpointError(f"{run} is no folder; name the output_dir of a run, or one of its checkpoints")
    if (run / "checkpoints").is_dir():
        found = list_checkpoints(run)
        if not found:
            raise CheckpointError(f"{run} has no checkpoints")
        problems = [f"{info.path.name}: {text}" for info in found for text in info.problems]
        checked = f"{len(found)} checkpoint{'s' if len(found) > 1 else ''}"
    else:
        problems, checked = verify_one(run), "1 checkpoint"
    if problems:
        raise CheckpointError(f"{run}:\n  " + "\n  ".join(problems))
    print(f"{run}: {checked} intact")
