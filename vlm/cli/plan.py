"""`vlm plan`: will it fit?"""

from __future__ import annotations

from typing import Annotated

import typer

from vlm.cli.configs import Config, Options
from vlm.config import unused_settings
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
    options: Options = None,
) -> None:
    """Print what each device would hold at the peak, whether that fits, and what else would. Loads no weights."""
    checked = load_checked(config, options or (), ("model",), ())  # the rest may be made later
    for line in unused_settings(checked):
        warn(line)
    count = gpus if gpus is not None else launched_size()
    if count < 1:
        raise ConfigError(f"--gpus {count}: expected at least 1")
    from vlm.plan.memory import device_memory, parse_memory
    from vlm.plan.report import full_report
    from vlm.precision import fast_precision
    from vlm.train.engines.device import choose_device

    if checked.train.precision == "auto":  # --memory describes a GPU; what is here can be asked
        device = choose_device(checked.engine.device)
        chosen = "bf16" if memory and checked.engine.device != "cpu" else fast_precision(device)
        checked = checked.model_copy(update={"train": checked.train.model_copy(update={"precision": chosen})})
    size, name = (parse_memory(memory), "as --memory says") if memory else device_memory(checked.engine.device, count)
    print("\n".join(full_report(checked, count, size, name)))
