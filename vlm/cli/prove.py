"""`vlm prove`: the checks that a run makes before its first step, alone."""

from __future__ import annotations

import typer

from vlm.cli.configs import Config, Options
from vlm.cli.train import DeepSpeed, Endpoint, Nnodes, Nproc, deepspeed_options, launched
from vlm.config_checks import load_checked
from vlm.logs import is_logging_rank, log


def register(app: typer.Typer) -> None:
    app.command()(prove)


def prove(
    config: Config,
    options: Options = None,
    deepspeed: DeepSpeed = None,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
) -> int:
    """Check a run on its own model and first records, as training does before its first step. Writes nothing."""
    chosen = [*(options or ()), *deepspeed_options(deepspeed)]
    code = launched(["prove", config], chosen, nproc, nnodes, rdzv_endpoint)
    if code is not None:
        return code
    checked = load_checked(config, chosen)
    from vlm.run import prove_alone

    proof = prove_alone(checked)
    if is_logging_rank():
        print(proof.table())
    if proof.failed:
        raise proof.error().on_every_rank()
    log(proof.line())
    return 0
