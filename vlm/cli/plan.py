"""`vlm plan`: will it fit, and how long will it take?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlm.cli.configs import Config, Options
from vlm.cli.options import AsJson
from vlm.config import load_config, unused_settings
from vlm.config_checks import load_checked
from vlm.errors import ConfigError
from vlm.launch import launched_size
from vlm.logs import warn


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    config: Config,
    gpus: Annotated[int | None, typer.Option(help="Devices of the launch; default: WORLD_SIZE, or 1.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of each, e.g. 24GiB; default: what is here.")] = None,
    gpu: Annotated[str | None, typer.Option(help="One that is not here, by its data sheet: H100, say.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's speed again.")] = False,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Print what each device would hold at the peak, whether that fits, what else would, and how long the run takes.

    Loads no weights. The first time, this machine's speed is measured for some 10 seconds, and kept.
    """
    from vlm.plan.kept_shapes import kept_line, with_kept_shapes

    checked = load_checked(config, options or (), ("model",), (), with_kept_shapes)  # the rest may be made later
    for line in unused_settings(checked):
        warn(line)
    count = gpus if gpus is not None else launched_size()
    if count < 1:
        raise ConfigError(f"--gpus {count}: expected at least 1")
    import torch

    from vlm.plan.machine import machine_of_sheet, sheet_of
    from vlm.plan.measure import measured_machine
    from vlm.plan.memory import device_memory, parse_memory
    from vlm.plan.records import read_some
    from vlm.plan.report import full_report, report_as_json
    from vlm.precision import autocast_dtype, fast_precision
    from vlm.train.engines.device import choose_device

    # --memory and --gpu describe a GPU; what is here can be asked
    is_elsewhere = gpu is not None or (memory is not None and checked.engine.device != "cpu")
    machine = None if gpu is None else machine_of_sheet(gpu)
    if checked.train.precision == "auto":
        chosen = "bf16" if is_elsewhere else fast_precision(choose_device(checked.engine.device))
        checked = checked.model_copy(update={"train": checked.train.model_copy(update={"precision": chosen})})
    if not is_elsewhere:
        dtype = autocast_dtype(checked.train.precision) or torch.float32
        machine = measured_machine(choose_device(checked.engine.device), dtype, measure, count > 1)
    if memory is not None:
        size, name = parse_memory(memory), "as --memory says"
    elif gpu is not None:
        size, name = int(sheet_of(gpu).memory * 1e9), f"one {gpu.upper()}, by its data sheet"
    else:
        size, name = device_memory(checked.engine.device, count)
    # by its own names: tokenizers are not among the kept shapes
    records = "" if machine is None else read_some(load_config(config, options or ()))
    if as_json:
        print(json.dumps(report_as_json(checked, count, size, name, machine, records), indent=2, ensure_ascii=False))
        return
    lines = [line] if (line := kept_line(checked)) else []
    print("\n".join(lines + full_report(checked, count, size, name, machine, records)))
