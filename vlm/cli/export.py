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
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A step, such as 500, or best; default: the newest. 检查点的步数。"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "fp16", "bf16", "fp32"],
        typer.Option(help="Of the weights written; auto: as the base model's, or as trained. 权重精度。"),
    ] = "auto",
    max_shard_size: Annotated[str | None, typer.Option(help="Largest weight file, such as 2GB.  [5GB]")] = None,
    format: Annotated[
        Literal["safetensors", "pth"], typer.Option(help="pth: one pickled file of tensors, for other tools.")
    ] = "safetensors",
    layout: Annotated[
        Literal["llava", "vlm"],
        typer.Option(help="Of --full: transformers' LLaVA where it can be, or vlm's own, to start another stage from."),
    ] = "llava",
) -> None:
    """Write a checkpoint of a run in the form that chat, serving and the next stage load."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it holds no config.yaml. Name the output_dir of a training run")
    step = _best_of(run) if checkpoint == "best" else None if checkpoint is None else step_of(checkpoint)
    if layout == "vlm" and not (full and format == "safetensors"):
        raise ConfigError("--layout vlm is one of --full, in safetensors: add --full, or drop it")
    if format == "pth":
        if max_shard_size is not None:
            raise ConfigError("--max-shard-size does not go with --format pth, which writes one file: drop one")
        from vlm.export.pth import export_pth

        print(export_pth(run, out, full=full, dtype=dtype, step=step))
        return
    from vlm.export.run import export_run

    size = max_shard_size or "5GB"
    print(export_run(run, out, full=full, max_shard_size=size, dtype=dtype, step=step, layout=layout))


def _best_of(run: Path) -> int:
    from vlm.train.checkpoint import best_step

    step = best_step(run)
    if step is None:
        raise CheckpointError(
            f"{run} has no best checkpoint, as train.keep_best makes one; `vlm ckpt ls {run}` lists all"
        )
    return step


def step_of(checkpoint: str) -> int:
    """The number in 500, step-000500 or RUN/checkpoints/step-000500. Raises ConfigError for anything else.

    >>> step_of("500"), step_of("cache/runs/a/checkpoints/step-000500/")
    (500, 500)
    """
    number = checkpoint.rstrip("/").rpartition("/")[2].removeprefix("step-")
    if not number.isdecimal():
        raise ConfigError(f"--checkpoint {checkpoint}: expected a step, such as 500. `vlm ckpt ls RUN` lists them")
    return int(number)
