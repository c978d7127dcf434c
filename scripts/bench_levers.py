"""What each lever of ours gives: the same job without and with it, in turn, as a ratio in one run.

    python scripts/bench_levers.py                          # all of them, toy size, on the CPU
    python scripts/bench_levers.py --only packing --rounds 5

A lever is a line of LEVERS. The options are those of `scripts/bench_train.py`, which measures. A ratio above 1 means
that the lever makes a record cheaper.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench_peers.parts import JOBS
from bench_train import Bench, Row, add_options, bench_of, interleave, loss_apart, rows_of


@dataclass(frozen=True)
class Lever:
    """Overrides of our config without it and with it."""

    name: str
    job: str
    off: tuple[str, ...]
    on: tuple[str, ...]


LEVERS = (
    Lever("packing, captions", "J1", ("data.packing=false",), ("data.packing=true",)),
    Lever("packing, conversations", "J2", ("data.packing=false",), ("data.packing=true",)),
    Lever("attention record by record", "J2", ("model.llm.attention=sdpa",), ("model.llm.attention=varlen",)),
    Lever("shared images", "J2-shared", ("data.share_images=false",), ("data.share_images=true",)),
    Lever("rows of 1,024 tokens, not 2,048", "J2", ("data.max_length=2048",), ("data.max_length=1024",)),
    Lever(
        "saving beside training, every step",
        "J2",
        ("train.save_every=1", "train.async_save=false"),
        ("train.save_every=1", "train.async_save=true"),
    ),
    Lever("cached features", "J1", ("data.cache_features=false",), ("data.cache_features=true",)),
)


def measure(bench: Bench, lever: Lever, rounds: int) -> dict[str, Row]:
    """Rows "off" and "on"."""
    job = JOBS[lever.job]
    tasks = {label: ("ours", bench.task(job, options)) for label, options in (("off", lever.off), ("on", lever.on))}
    return rows_of(bench, tasks, interleave(bench, tasks, rounds))


HEAD = (
    "| lever | job | off, CPU s | on, CPU s | CPU | wall | memory | fill off, on | first loss apart |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line_of(lever: Lever, rows: dict[str, Row]) -> str:
    """A row of the table; CPU, wall and memory are off / on."""
    off, on = rows["off"], rows["on"]
    return (
        f"| {lever.name} | {lever.job} | {off.cpu_seconds:.3f} | {on.cpu_seconds:.3f} | "
        f"{off.cpu_seconds / on.cpu_seconds:.2f} | {off.wall_seconds / on.wall_seconds:.2f} | "
        f"{off.peak_gb / on.peak_gb:.2f} | {off.fill:.0%}, {on.fill:.0%} | {loss_apart(off, on):.0e} |"
    )


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--only", default="", help="part of a lever's name")
    arguments = parser.parse_args(given)
    bench = bench_of(arguments)
    chosen = [lever for lever in LEVERS if arguments.only in lever.name]
    if not chosen:
        parser.error(f"--only {arguments.only}: no such lever; there are {', '.join(lever.name for lever in LEVERS)}")
    print(f"{bench.describe()}, {arguments.rounds} rounds\n\n{HEAD}", flush=True)
    for lever in chosen:
        print(line_of(lever, measure(bench, lever, arguments.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
