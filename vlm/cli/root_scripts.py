"""The mains of train.py, train_pipeline.py, cli_demo.py and webui_demo.py."""

from __future__ import annotations

import argparse
import sys

from vlm.cli.main import app
from vlm.cli.process import end, run, with_hyphens
from vlm.cli.train import deepspeed_options, resume_step, start_training, work_dir_options


def main_train() -> None:
    """`python train.py --cfg-path x.yaml [--options a=b c=d]`, also under torchrun, deepspeed and accelerate."""

    def command() -> None:
        arguments = train_parser().parse_args(_arguments())
        options = [*arguments.options, *(["engine.kind=zero"] if arguments.use_deepspeed else [])]
        options += [*deepspeed_options(arguments.deepspeed), *work_dir_options(arguments.work_dir)]
        start_training(arguments.cfg_path, options, resume=arguments.resume and resume_step(arguments.resume))

    end(run(command))


def main_train_pipeline() -> None:
    """`torchrun --nproc_per_node=4 train_pipeline.py --cfg-path x.yaml --num-stages 2`."""

    def command() -> None:
        arguments = train_pipeline_parser().parse_args(_arguments())
        options = [*arguments.options, "engine.kind=pipeline"]
        if arguments.num_stages is not None:
            options.append(f"engine.num_stages={arguments.num_stages}")
        options += work_dir_options(arguments.work_dir)
        start_training(arguments.cfg_path, options, resume=arguments.resume and resume_step(arguments.resume))

    end(run(command))


def main_cli_demo() -> None:
    """`python cli_demo.py -c EXPORT [flags of vlm chat]`: asks for an image, then chats."""

    def command() -> object:
        parser = argparse.ArgumentParser(
            prog="cli_demo.py",
            description="Chat in the terminal. 在终端里对话。",
            add_help=False,
            allow_abbrev=False,
        )
        parser.add_argument(
            "-c", "--checkpoint-path", required=True, metavar="EXPORT", help="an export folder 导出的模型文件夹"
        )
        given = with_hyphens(sys.argv[1:])
        if {"-h", "--help"} & set(given):
            print(parser.format_help() + "\nAnd all options of vlm chat. 以及 vlm chat 的所有选项：\n")
            return app(["chat", "--help"], prog_name="vlm", standalone_mode=False)
        known, rest = parser.parse_known_args(given)
        return app(["chat", known.checkpoint_path, *rest], prog_name="cli_demo.py", standalone_mode=False)

    sys.exit(run(command))


def main_webui_demo() -> None:
    """`python webui_demo.py -c EXPORT [flags of vlm webui]`."""

    def command() -> object:
        parser = argparse.ArgumentParser(
            prog="webui_demo.py", description="Chat in the browser; `vlm webui -h` lists the other flags."
        )
        parser.add_argument("-c", "--checkpoint-path", help="an export folder; without it, all below cache/runs")
        parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
        known, rest = parser.parse_known_args(with_hyphens(sys.argv[1:]))
        device = ["--device", "cpu"] if known.cpu_only else []
        export = [known.checkpoint_path] if known.checkpoint_path else []
        return app(["webui", *export, *device, *rest], standalone_mode=False)

    sys.exit(run(command))


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model from a YAML config.")
    parser.add_argument("--use-deepspeed", action="store_true", help="engine.kind zero, as engine.stage says")
    parser.add_argument("--deepspeed", metavar="NAME", help="zero0, zero1, zero2, zero3, or a DeepSpeed JSON")
    return _with_config(parser)


def train_pipeline_parser() -> argparse.ArgumentParser:
    """The flags of train_pipeline.py."""
    parser = argparse.ArgumentParser(prog="train_pipeline.py", description="Train a model cut into stages.")
    parser.add_argument("--num-stages", type=int, help="parts of the model; default: engine.num_stages")
    return _with_config(parser)


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--cfg-path", required=True, help="a YAML file, or a shipped project such as quickstart/pretrain"
    )
    parser.add_argument(
        "--options", "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys"
    )
    parser.add_argument("--work-dir", metavar="DIR", help="the run's folder instead of output_dir")
    parser.add_argument("--resume", metavar="STEP", help="go on from this checkpoint, 600 or step-000600")
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
    return parser


def _arguments() -> list[str]:
    return with_hyphens(sys.argv[1:])
