"""What a training step costs, ours and other trainers', side by side on the same records.

    python scripts/bench_train.py                              # toy size, on the CPU, against transformers' Trainer
    python scripts/bench_train.py --threads 1 --rounds 5 --samples 24 --batch 8           # as in docs/benchmarks.md
    python scripts/bench_train.py --jobs J2 --against trainer,trl,llamafactory --python-of llamafactory=lf/bin/python
    python scripts/bench_train.py --jobs J1 --set data.packing=false --set data.cache_features=true
    python scripts/bench_train.py --shape 7b --jobs J2-lora --device cuda --precision bf16 --set data.max_length=4096

Jobs: J1 trains the projector on captions, J2 projector and language model on conversations, J2-lora projector and
adapters. Models have random weights, records are drawn; both lie in --folder and are made once. Every measurement is a
process of its own; all systems are measured in turn, round after round, and medians are printed. A system takes about
--batch records per optimizer step, the first --warmup steps are not counted. Time per record is that of the tokens
measured, times the tokens of the job's mean record: which records a trainer happens to draw does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from bench_peers.meter import RESULT, Result, Task
from bench_peers.parts import JOBS, SHAPES, Job, Shape, needed_flops, prepare_parts, settings_of, tokens_of, write_llava

PEERS = Path(__file__).parent / "bench_peers"
# peer: its file, the package without which it is skipped, and what it trains
SYSTEMS = {
    "ours": ("ours.py", "vlm", tuple(JOBS)),
    "trainer": ("trainer.py", "transformers", tuple(JOBS)),
    "trl": ("trl_sft.py", "trl", ("J2", "J2-lora")),
    "llamafactory": ("llamafactory_sft.py", "llamafactory", ("J2", "J2-lora")),
}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of the first loss; worst seen in fp32: 2e-7
PHASES = ("data", "encode", "forward_backward", "optimizer")


@dataclass(frozen=True)
class Bench:
    """What all measurements have in common."""

    shape: str = "toy"
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    batch: int = 4
    samples: int = 8
    warmup: int = 1
    folder: Path = Path("cache/bench")
    pythons: tuple[tuple[str, str], ...] = ()  # system -> interpreter

    def python_of(self, system: str) -> str:
        return dict(self.pythons).get(system, sys.executable)

    def describe(self) -> str:
        return (
            f"{self.shape}, {self.device}, {self.precision}, threads {self.threads}, {self.samples} records a round "
            f"after {self.warmup} steps"
        )

    @cached_property
    def parts(self) -> Path:
        """Models and records, made if they are not there. Enough records that packed rows are as full as usual."""
        return prepare_parts(self.folder, self.shape, self.precision, max(128, 4 * self.samples))

    def task(self, job: Job, options: Sequence[str] = ()) -> Task:
        parts = self.parts
        settings = settings_of(
            job, SHAPES[self.shape], parts,
            precision=self.precision, device=self.device, batch=self.batch, options=options,
        )  # fmt: skip
        text = json.dumps(settings, indent=1)  # JSON is YAML
        config = parts / f"{job.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
        config.write_text(text)
        return Task(
            job=job.name, parts=str(parts), config=str(config), options=list(options), llava=str(parts / "llava"),
            device=self.device, precision=self.precision, threads=self.threads, batch=self.batch,
            tokens=tokens_of(job, SHAPES[self.shape]),
            samples=self.samples, warmup=self.warmup, checkpointing=SHAPES[self.shape].checkpointing,
        )  # fmt: skip

    def measure(self, system: str, task: Task) -> Result:
        """In a fresh process. Raises RuntimeError with the end of what it printed if it fails."""
        if system != "ours" and not Path(task.llava).exists():
            write_llava(Path(task.llava), Path(self.task(JOBS["J2"]).config))  # whose chat template peers need
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        root = Path(__file__).parents[1]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [self.python_of(system), str(PEERS / SYSTEMS[system][0]), json.dumps(asdict(task))],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode or not found:
            raise RuntimeError(f"{system}, {task.job}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return Result(**json.loads(found[-1].removeprefix(RESULT)))

    def lacks(self, system: str) -> bool:
        """Whether the system's interpreter cannot import it."""
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({SYSTEMS[system][1]!r}) is None)"
        return subprocess.run([self.python_of(system), "-c", find], check=False).returncode != 0


@dataclass(frozen=True)
class Row:
    """Medians of a system's rounds, per record."""

    tokens: float  # of that record
    cpu_seconds: float
    wall_seconds: float
    peak_gb: float
    fill: float  # share of the computed tokens that are of records
    utilisation: float  # of the matrix product measured beside it
    phases: dict[str, float]  # share of the wall time
    first_loss: float | None
    spread: float  # (slowest - fastest) / median of the rounds

    @classmethod
    def of(
        cls, results: Sequence[Result], job: Job, shape: Shape, tokens: float, is_on_gpu: bool, encodes: bool
    ) -> Row:
        """
        Args:
            tokens: of the job's mean record.
        """

        def median(values: Sequence[float]) -> float:
            return statistics.median(values)

        def units(result: Result) -> float:
            return result.records if job.by_record else result.tokens

        per_record = 1.0 if job.by_record else tokens

        def cost(result: Result) -> float:
            return (result.wall_seconds if is_on_gpu else result.cpu_seconds) / units(result) * per_record

        def utilisation(result: Result) -> float:
            supervised = result.supervised / units(result) * per_record
            flops = needed_flops(job, shape, tokens=tokens, supervised=supervised, encodes=encodes)
            return flops / cost(result) / result.matmul_flops

        costs = [cost(result) for result in results]
        return cls(
            tokens,
            median([result.cpu_seconds / units(result) * per_record for result in results]),
            median([result.wall_seconds / units(result) * per_record for result in results]),
            median([result.peak_bytes / 1e9 for result in results]),
            median([result.tokens / result.slots for result in results]),
            median([utilisation(result) for result in results]),
            {
                phase: median([result.phases.get(phase, 0.0) / result.wall_seconds for result in results])
                for phase in PHASES
                if any(phase in result.phases for result in results)
            },
            results[0].first_loss,
            (max(costs) - min(costs)) / median(costs),
        )


def interleave(bench: Bench, tasks: dict[str, tuple[str, Task]], rounds: int) -> dict[str, list[Result]]:
    """Measure all in turn, `rounds` times.

    Args:
        tasks: label -> (system, task).
    """
    results: dict[str, list[Result]] = {label: [] for label in tasks}
    for number in range(rounds):
        for label, (system, task) in tasks.items():
            print(f"round {number + 1} of {rounds}: {task.job}, {label}", file=sys.stderr, flush=True)
            results[label].append(bench.measure(system, task))
    return results


def rows_of(bench: Bench, tasks: dict[str, tuple[str, Task]], results: dict[str, list[Result]]) -> dict[str, Row]:
    """Per record of the same mean length, whatever each of them drew."""
    every = [result for measured in results.values() for result in measured]
    tokens = sum(result.tokens for result in every) / sum(result.records for result in every)
    return {
        label: Row.of(
            results[label],
            JOBS[task.job],
            SHAPES[bench.shape],
            tokens,
            bench.device == "cuda",
            encodes="data.cache_features=true" not in task.options,
        )
        for label, (_, task) in tasks.items()
    }


HEAD = (
    "| | CPU s | wall s | peak GB | fill | utilisation | data | encode | fwd+bwd | optimizer | spread |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def line_of(label: str, row: Row) -> str:
    """A row of the table; a phase that a system does not tell apart is a dash."""
    phases = " | ".join(f"{row.phases[phase]:.0%}" if phase in row.phases else "-" for phase in PHASES)
    return (
        f"| {label} | {row.cpu_seconds:.3f} | {row.wall_seconds:.3f} | {row.peak_gb:.2f} | {row.fill:.0%} | "
        f"{row.utilisation:.0%} | {phases} | {row.spread:.0%} |"
    )


def compare(ours: Row, other: Row, label: str, precision: str) -> str:
    """
    >>> row = Row(300, 2.0, 2.0, 3.0, 1.0, 0.5, {}, 7.0, 0.0)
    >>> compare(Row(300, 1.0, 1.0, 1.5, 1.0, 0.9, {}, 7.0, 0.0), row, "trainer", "fp32")
    'trainer / ours: CPU time 2.00, wall time 2.00; ours has 0.50 of its peak memory; first loss apart by 0e+00'
    """
    text = (
        f"{label} / ours: CPU time {other.cpu_seconds / ours.cpu_seconds:.2f}, wall time "
        f"{other.wall_seconds / ours.wall_seconds:.2f}; ours has {ours.peak_gb / other.peak_gb:.2f} of its peak memory"
    )
    if ours.first_loss is None or other.first_loss is None:
        return text
    apart = loss_apart(ours, other)
    at_most = LOSS_TOLERANCE[precision]
    verdict = "" if apart <= at_most else f", MORE THAN {at_most:.0e}: they do not compute the same"
    return f"{text}; first loss apart by {apart:.0e}{verdict}"


def loss_apart(one: Row, other: Row) -> float:
    """Relative difference of the losses of the first records before any update."""
    assert one.first_loss is not None
    assert other.first_loss is not None
    return abs(other.first_loss / one.first_loss - 1)


def bench_job(bench: Bench, job: Job, systems: Sequence[str], rounds: int, options: Sequence[str]) -> bool:
    """Measure and print one job. Returns whether all first losses agree."""
    chosen = [system for system in systems if job.name in SYSTEMS[system][2]]
    task = bench.task(job, options)
    tasks = {system: (system, task) for system in chosen}
    results = interleave(bench, tasks, rounds)
    rows = rows_of(bench, tasks, results)
    first = results["ours"][0]
    print(
        f"\n{job.name}: {job.title}. {bench.describe()}, {rounds} rounds, {first.versions}; per record of "
        f"{next(iter(rows.values())).tokens:.0f} tokens\n\n{HEAD}"
    )
    for system, row in rows.items():
        print(line_of(system, row))
    lines = [compare(rows["ours"], row, system, bench.precision) for system, row in rows.items() if system != "ours"]
    print("", *lines, sep="\n", flush=True)
    return not any("MORE THAN" in line for line in lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8, help="records per measurement, at least")
    parser.add_argument("--batch", type=int, default=4, help="records per optimizer step, about")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path("cache/bench"), help="of models and records")


def bench_of(arguments: argparse.Namespace, pythons: tuple[tuple[str, str], ...] = ()) -> Bench:
    return Bench(
        arguments.shape, arguments.device, arguments.precision, arguments.threads, arguments.batch,
        arguments.samples, arguments.warmup, arguments.folder.resolve(), pythons,
    )  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--jobs", default="J1,J2,J2-lora", help="names, with commas between them")
    parser.add_argument("--against", default="trainer", help="trainer, trl, llamafactory, with commas; empty for none")
    parser.add_argument("--python-of", action="append", default=[], metavar="PEER=PYTHON", help="its own interpreter")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of our config")
    arguments = parser.parse_args(given)
    bench = bench_of(arguments, tuple(tuple(pair.split("=", 1)) for pair in arguments.python_of))
    systems = ["ours"]
    for peer in filter(None, arguments.against.split(",")):
        if bench.lacks(peer):
            print(f"{peer} is skipped: {bench.python_of(peer)} cannot import it (pip install -e '.[bench]')")
        else:
            systems.append(peer)
    agree = [
        bench_job(bench, JOBS[name], systems, arguments.rounds, arguments.set) for name in arguments.jobs.split(",")
    ]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
