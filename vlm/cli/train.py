"""`vlm train | eval | plot`, and the mains of train.py and train_pipeline.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.configs import Config, Options
from vlm.config import load_config, resolve_for_log
from vlm.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command("eval")(evaluate)
    app.command()(plot)


def train(config: Config, options: Options = None) -> None:
    """Train. The same command resumes from the newest intact checkpoint of its output_dir."""
    start_training(config, options or ())


def evaluate(
    config: Annotated[str, typer.Argument(help="A config, a run folder, or an export inside one.")],
    export: Annotated[Path | None, typer.Option(help="Export to evaluate; default: output_dir/export.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go; default: beside the export.")] = None,
    options: Options = None,
) -> None:
    """Run the evaluation tasks of a config on an export: own pictures, shuffled pictures, baseline."""
    path, found = _config_and_export(config)
    checked = load_config(path, options or ())
    from vlm.evaluation.report import evaluate_run

    evaluate_run(checked, export or found, out)


def plot(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw loss.png from a run's metrics.jsonl, also while it trains."""
    from vlm.train.metrics import plot_loss

    print(plot_loss(run))


def start_training(config: str, options: Sequence[str]) -> None:
    """Validate, then train. Raises ConfigError before torch is imported when the config or the launch is wrong."""
    checked = load_config(config, options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: engine {checked.engine.kind} runs in one process, and no "
            "engine for several is built yet. Start it with --nproc_per_node=1, or with `vlm train`"
        )
    text = resolve_for_log(config, options)
    from vlm.run import train as train_run

    train_run(checked, text)


def main_train() -> None:
    """`python train.py --cfg-path x.yaml [--options a=b c=d]`, also under torchrun."""
    from vlm.cli.main import run

    def command() -> None:
        arguments = _parse(argparse.ArgumentParser(prog="train.py", description="Train a model from a YAML config."))
        if arguments.use_deepspeed:
            raise ConfigError("--use-deepspeed: the DeepSpeed engines are not built yet; leave the flag out")
        start_training(arguments.cfg_path, arguments.options)

    sys.exit(run(command))


def main_train_pipeline() -> None:
    """`python train_pipeline.py --cfg-path x.yaml --num-stages 2`: not built yet, and says so."""
    from vlm.cli.main import run

    def command() -> None:
        parser = argparse.ArgumentParser(prog="train_pipeline.py", description="Train a model cut into stages.")
        parser.add_argument("--num-stages", type=int, default=2)
        arguments = _parse(parser)
        raise ConfigError(
            "the pipeline engine is not built yet; train in one process instead: "
            f"python train.py --cfg-path {arguments.cfg_path}"
        )

    sys.exit(run(command))


def _config_and_export(name: str) -> tuple[str, Path | None]:
    """A config as it is; a run folder -> its config.yaml; an export -> the config of the run around it, and itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name, None
    if (folder / "vlm.json").is_file():
        if (folder.parent / "config.yaml").is_file():
            return str(folder.parent / "config.yaml"), folder
        raise ConfigError(
            f"{name} is an export without its run, so the tasks are not known: vlm eval CONFIG --export {name}"
        )
    return (str(folder / "config.yaml") if (folder / "config.yaml").is_file() else name), None


def _parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    from vlm.cli.main import with_hyphens

    parser.add_argument(
        "--cfg-path", required=True, help="a YAML file, or a shipped project such as quickstart/pretrain"
    )
    parser.add_argument(
        "--options", "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys"
    )
    parser.add_argument("--use-deepspeed", action="store_true", help="not built yet")
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
    return parser.parse_args(with_hyphens(sys.argv[1:]))
