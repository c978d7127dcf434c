"""Do all engines compute the same? Trains a config for some steps with each and prints the differences.

    python scripts/prove_engines.py tiny/finetune --steps 8
    python scripts/prove_engines.py my.yaml --engines local ddp*2 zero3*2 pipeline2*4 --options data.max_length=512

An engine is written kind[stage or stages][*processes]: zero3*2 is ZeRO stage 3 on two processes, pipeline2*4 two
stages on four. Losses, gradient norms and trained weights are compared with those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.train.engines.kinds import ENGINES as KINDS

ENGINES = tuple(f"{name}{form}" for name, kind in KINDS.items() for form in kind.proven_as)


@dataclass(frozen=True)
class Case:
    """An engine and overrides of the config, under a name of its own."""

    engine: str
    options: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return int(self.engine.partition("*")[2] or 1)

    @property
    def launch(self) -> str:
        """Cases of one launch. DeepSpeed keeps a pipeline's groups for the life of a process."""
        return self.engine if KINDS[self._kind].has_stages else f"{self.processes}"

    @property
    def overrides(self) -> list[str]:
        number, key = self._name.removeprefix(self._kind), KINDS[self._kind].numbered_by
        numbered = [f"engine.{key}={number}"] if key and number else []
        return [*self.options, f"engine.kind={self._kind}", *numbered]

    @property
    def _name(self) -> str:
        return self.engine.partition("*")[0]

    @property
    def _kind(self) -> str:
        kind = self._name.rstrip("0123456789")
        if kind not in KINDS:
            raise SystemExit(f"engine {self.engine}: write local, ddp*2, zero2*2, fsdp*2 or pipeline2*4")
        return kind


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    weights: Path  # a checkpoint folder
    metrics: list[dict[str, float]] = field(default_factory=list)  # of each step, by name


def start(job: Path, processes: int) -> None:
    """Let each process of a launch `work` at the job."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--job", str(job)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def run_cases(
    config: str,
    cases: Sequence[Case],
    steps: int,
    folder: Path,
    start: Callable[[Path, int], None] = start,
) -> dict[Case, Outcome]:
    """Train each case for `steps` steps. Cases of one kind and as many processes share a launch."""
    outcomes: dict[Case, Outcome] = {}
    for name in dict.fromkeys(case.launch for case in cases):
        group = [case for case in cases if case.launch == name]
        processes = group[0].processes
        job = folder / f"job-{name}.json"
        folders = [str(folder / f"{name}-{number}") for number in range(len(group))]
        entries = [{"overrides": case.overrides, "out": out} for case, out in zip(group, folders, strict=True)]
        job.write_text(json.dumps({"config": config, "steps": steps, "cases": entries}))
        start(job, processes)
        for case, out in zip(group, map(Path, folders), strict=True):
            numbers = json.loads((out / "numbers.json").read_text())
            outcomes[case] = Outcome(numbers["losses"], numbers["grad_norms"], out, numbers["metrics"])
    return outcomes


def work(job: Path) -> None:
    """One rank of a launch: go through its cases."""
    from vlm.config import load_config
    from vlm.distributed import process_group
    from vlm.train.engines.device import choose_device

    task = json.loads(job.read_text())
    first = load_config(task["config"], task["cases"][0]["overrides"])
    device = choose_device(first.engine.device)
    with process_group(device, first.engine.timeout_seconds, always=True):
        for case in task["cases"]:
            config = load_config(task["config"], case["overrides"])
            train_case(config, task["steps"], Path(case["out"]), device)


def train_case(config: Any, steps: int, out: Path, device: Any) -> None:
    """The run of `vlm.run.train` without checkpoints and reports."""
    import numpy as np
    import torch

    from vlm.distributed import barrier, is_main
    from vlm.prepare import prepare_run
    from vlm.train.loop import TrainLoop
    from vlm.train.reference import with_reference_of
    from vlm.train.rollouts import build_rollouts

    torch.manual_seed(config.seed)
    parts = prepare_run(config, device)
    data = parts.data
    if config.objective.needs_reference:
        data = with_reference_of(
            data, config.data, parts.engine, np.flatnonzero(data.train.order.scan.lengths).tolist()
        )
    losses, grad_norms, metrics = [], [], []

    def report(step: int, batches: Any, output: Any, counts: Any, seconds: Any) -> None:
        losses.append(output.loss)
        grad_norms.append(output.grad_norm)
        metrics.append({**output.metrics, **output.told})

    TrainLoop(
        engine=parts.engine,
        objective=parts.objective,
        stream=data.train,
        schedule=lambda step: 1.0,
        max_steps=steps,
        report=report,
        save=lambda step, required: True,
        roll=build_rollouts(config, data, parts.engine, parts.start, lambda line: None),
        updates=config.objective.updates_per_step,
    ).run()
    if is_main():
        out.mkdir(parents=True)
        numbers = {"losses": losses, "grad_norms": grad_norms, "metrics": metrics}
        (out / "numbers.json").write_text(json.dumps(numbers))
    barrier()
    parts.engine.save(out)
    barrier()


def worst_differences(reference: Outcome, other: Outcome) -> tuple[float, float, float]:
    """Largest relative difference of losses and of gradient norms, and largest mean difference of a weight tensor."""
    from vlm.train.fragments import read_weights

    def relative(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / max(abs(x), 1e-12) if math.isfinite(y) else math.inf for x, y in zip(a, b, strict=True))

    expected, got = read_weights(reference.weights), read_weights(other.weights)
    if expected.keys() != got.keys():
        raise SystemExit(f"other weights were trained: {sorted(expected.keys() ^ got.keys())[:5]}")
    apart = max((expected[name].float() - got[name].float()).abs().mean().item() for name in expected)
    return relative(reference.losses, other.losses), relative(reference.grad_norms, other.grad_norms), apart


def table(outcomes: dict[Case, Outcome]) -> str:
    lines = ["| engine | loss, first and last | loss | gradient norm | weights |", "|---|---|---|---|---|"]
    reference = next(iter(outcomes.values()))
    for case, outcome in outcomes.items():
        loss, norm, apart = worst_differences(reference, outcome)
        ends = f"{outcome.losses[0]:.6f} {outcome.losses[-1]:.6f}"
        lines.append(f"| {case.engine} | {ends} | {loss:.1e} | {norm:.1e} | {apart:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file or a shipped project")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        from vlm.cli.process import end

        work(arguments.job)
        end(0)
    if arguments.config is None:
        parser.error("name a config")
    cases = [Case(engine, tuple(arguments.options)) for engine in dict.fromkeys(["local", *arguments.engines])]
    with tempfile.TemporaryDirectory() as folder:
        print(table(run_cases(arguments.config, cases, arguments.steps, Path(folder))))
    print("\nLast three columns: the worst relative difference of a step's loss and gradient norm from one process,")
    print("and the worst mean absolute difference of a trained tensor after the last step.")


if __name__ == "__main__":
    main()
