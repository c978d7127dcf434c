"""`vlm train | eval | plot`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.configs import Config, Options
from vlm.cli.options import AdapterOption, BitsOption
from vlm.config import resolve_for_log
from vlm.config_checks import load_checked
from vlm.errors import ConfigError, RunLocked
from vlm.launch import asked_processes, is_of_torchrun, is_restarted, launched_rank
from vlm.train.ended import ENDED, OWNER, read_end, write_end

DeepSpeed = Annotated[
    str | None, typer.Option(help="zero0, zero1, zero2, zero3, or a DeepSpeed JSON: engine.kind zero with it.")
]
Nproc = Annotated[int | None, typer.Option(help="Processes on this machine, started with torchrun.")]
Nnodes = Annotated[int, typer.Option(help="Machines; start the same command on each.")]
Endpoint = Annotated[str | None, typer.Option(help="host:port of one of the machines, where all meet.")]


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command("eval")(evaluate)
    app.command()(plot)


def train(
    config: Config,
    options: Options = None,
    deepspeed: DeepSpeed = None,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Annotated[int, typer.Option(help="How often to start again when a process is lost.")] = 0,
    profile: Annotated[int, typer.Option(help="Steps to profile, after the first two: a trace and a table.")] = 0,
    work_dir: Annotated[str | None, typer.Option(help="The run's folder instead of output_dir.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on from this checkpoint, 600 or step-000600.")] = None,
) -> int:
    """Train. The same command resumes from the newest intact checkpoint of its output_dir."""
    chosen = [*(options or ()), *deepspeed_options(deepspeed), *work_dir_options(work_dir)]
    if profile < 0:
        raise ConfigError(f"--profile {profile}: expected a number of steps, or 0 for none")
    step = None if resume is None else resume_step(resume)
    flags = [*(["--profile", str(profile)] if profile else []), *([] if step is None else ["--resume", str(step)])]
    command = ["train", *flags, config]
    code = launched(command, chosen, nproc, nnodes, rdzv_endpoint, max_restarts)
    if code is None:
        start_training(config, chosen, profile, step)
    return code or 0


def launched(
    command: Sequence[str], options: Sequence[str], nproc: int | None, nnodes: int, endpoint: str | None,
    max_restarts: int = 0,
) -> int | None:  # fmt: skip
    """Run a command on a config in several processes, if that is asked for. Returns its exit code, else None."""
    for flag, number, least in (("--nproc", nproc, 1), ("--nnodes", nnodes, 1), ("--max-restarts", max_restarts, 0)):
        if number is not None and number < least:
            raise ConfigError(f"{flag} {number}: expected at least {least}")
    nproc = asked_processes() if nproc is None else nproc
    if nproc is None and nnodes == 1:
        return None
    from vlm.cli.launch import Launch, launch

    load_checked(command[-1], options)  # once, rather than in every process
    arguments = [*command, *(part for option in options for part in ("--options", option))]
    return launch(Launch(nproc or 1, nnodes, endpoint, max_restarts), arguments)


def evaluate(
    config: Annotated[str, typer.Argument(help="A config, a run folder, or an export inside one.")],
    export: Annotated[
        Path | None, typer.Option(help="Export or model folder to evaluate; default: output_dir/export.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go; default: beside the export.")] = None,
    adapter: AdapterOption = None,
    bits: BitsOption = None,
    options: Options = None,
) -> None:
    """Run the evaluation tasks of a config on an export: own images, shuffled images, baseline."""
    path, found = config_and_export(config)
    checked = load_checked(path, options or (), ("evaluation",), ())  # the export names its models
    from vlm.evaluation.report import evaluate_run

    evaluate_run(checked, export or found, out, adapter, bits)


def plot(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw loss.png from a run's metrics.jsonl, also while it trains."""
    from vlm.train.metrics import plot_loss

    print(plot_loss(run))


def start_training(config: str, options: Sequence[str], profile_steps: int = 0, resume: int | None = None) -> None:
    """Validate, then train. Raises ConfigError before torch is imported when the config or a path in it is wrong.

    Args:
        resume: step of the checkpoint to go on from; None takes the newest, and so do processes that torchrun has
            started again.
    """
    checked = load_checked(config, options)
    text = resolve_for_log(config, options)
    from vlm.run import train as train_run

    with _ending_once(Path(checked.output_dir)):
        train_run(checked, text, profile_steps, None if is_restarted() else resume)


@contextmanager
def _ending_once(run: Path) -> Iterator[None]:
    """Keep in the run folder how the launch ends, for `vlm runs` and for a restart.

    torchrun's --max-restarts also starts a launch again that ended on purpose: stopped by a signal, diverged, refused.
    What is started again then ends as it did, so that the launch comes to its end with that exit code.
    """
    launch = os.getppid()  # the launcher's; the names of launches repeat
    ended = read_end(run)
    if is_of_torchrun() and is_restarted() and ended and ended["launch"] == launch and ended["everywhere"]:
        raise typer.Exit(ended["code"])
    is_main = launched_rank() == 0
    if is_main and is_of_torchrun():
        (run / ENDED).unlink(missing_ok=True)
    try:
        yield
    except RunLocked:  # another launch is at work there
        raise
    except Exception as error:
        if is_main:
            _keep_end(run, launch, error)
        raise
    if is_main:
        _keep_end(run, launch, None)


def _keep_end(run: Path, launch: int, error: Exception | None) -> None:
    """A folder that no run has held belongs to something else, but a launcher must know that it was refused."""
    if run.is_dir() and (is_of_torchrun() or (run / OWNER).is_file()):
        write_end(run, launch, error)


def resume_step(text: str) -> int:
    """
    >>> resume_step("600"), resume_step("step-000600")
    (600, 600)
    """
    number = text.removeprefix("step-")
    if not number.isdecimal():
        raise ConfigError(f"--resume {text}: expected a step, 600 or step-000600; `vlm ckpt ls RUN` lists them")
    return int(number)


def work_dir_options(folder: str | None) -> list[str]:
    """
    >>> work_dir_options("runs/${name}: 1")
    ['output_dir="runs/${name}: 1"']
    """
    return [] if folder is None else [f"output_dir={json.dumps(folder, ensure_ascii=False)}"]


def deepspeed_options(name: str | None) -> list[str]:
    """Config overrides for `--deepspeed zero2` or `--deepspeed my.json`, whose stage and offload are taken over.

    >>> deepspeed_options("zero3")
    ['engine.kind=zero', 'engine.stage=3']
    >>> deepspeed_options("deepspeed_zero3") == deepspeed_options("zero3")  # XTuner's name
    True
    """
    if name is None:
        return []
    if name.removeprefix("deepspeed_") in ("zero0", "zero1", "zero2", "zero3"):
        return ["engine.kind=zero", f"engine.stage={name[-1]}"]
    if not name.endswith(".json"):
        raise ConfigError(f"--deepspeed {name}: known are zero0, zero1, zero2, zero3, or the path of a .json file")
    from vlm.train.engines.deepspeed_settings import read_json

    zero = read_json(name).get("zero_optimization", {})
    offload = [
        what
        for what, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
        if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    chosen = ["engine.kind=zero", f"engine.deepspeed={name}", f"engine.stage={zero.get('stage', 0)}"]
    return [*chosen, f"engine.offload=[{','.join(offload)}]"]


def config_and_export(name: str) -> tuple[str, Path | None]:
    """A config as it is; a run folder -> its config.yaml and its export, wherever the run lay when it was made; an
    export -> the config of the run around it, and itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name, None
    if (folder / "vlm.json").is_file():
        if (folder.parent / "config.yaml").is_file():
            return str(folder.parent / "config.yaml"), folder
        raise ConfigError(
            f"{name} is an export without its run, so the tasks are not known: vlm eval CONFIG --export {name}"
        )
    if (folder / "config.yaml").is_file():
        return str(folder / "config.yaml"), folder / "export"
    return name, None
