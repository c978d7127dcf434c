"""`vlm compare`: curves of several runs over each other, and where their configs differ. Without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm.curves import running_mean
from vlm.errors import DataError
from vlm.layered_yaml import dotted, leaves
from vlm.runs import RunSummary, Series, read_series, summarize

_NUM_PLACES = 8  # steps at which a table compares curves
_MISSING = "-"


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other; lists are in the order of the runs."""

    names: list[str]  # the parts of their paths that tell them apart
    summaries: list[RunSummary]
    metric: str
    series: list[Series]
    held_out: list[Series]
    places: list[tuple[int, list[float | None]]]  # step -> mean of the metric since the place before
    differences: dict[str, list[Any]]  # key of config.yaml -> its values, None where it is not written

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": [summary.as_json() for summary in self.summaries],
            "metric": self.metric,
            "series": [{"steps": each.steps, "values": each.values} for each in self.series],
            "held_out_loss": [{"steps": each.steps, "values": each.values} for each in self.held_out],
            "differences": self.differences,
        }


def compare_runs(runs: Sequence[Path], metric: str = "loss") -> Comparison:
    """Read what `vlm compare` shows.

    Args:
        metric: a number of metrics.jsonl.

    Raises:
        DataError: fewer than two runs, one that is not a run folder or has no step yet, or a metric that none has.
    """
    if len({run.resolve() for run in runs}) < 2:
        raise DataError("compare needs two or more run folders: vlm compare runs/a runs/b; vlm runs lists them")
    found = [read_series(run) for run in runs]
    if not any(metric in each for each in found):
        known = ", ".join(sorted(set().union(*found)))
        raise DataError(f"--metric {metric}: no line of these runs has it; they have {known}")
    series = [each.get(metric, Series()) for each in found]
    return Comparison(
        names=short_names(runs),
        summaries=[summarize(run) for run in runs],
        metric=metric,
        series=series,
        held_out=[each.get("held_out_loss" if metric == "loss" else "", Series()) for each in found],
        places=_places(series),
        differences=diff_configs([run / "config.yaml" for run in runs]),
    )


def short_names(runs: Sequence[Path]) -> list[str]:
    """
    >>> short_names([Path("/x/runs/a/sft"), Path("/x/runs/b/sft")])
    ['a/sft', 'b/sft']
    """
    paths = [run.resolve() for run in runs]
    common = Path(os.path.commonpath(paths))
    return [path.relative_to(common).as_posix() if path != common else path.name for path in paths]


def diff_configs(files: Sequence[Path]) -> dict[str, list[Any]]:
    """Keys whose values differ, as they are written: `${...}` stays, as it may hold a secret. output_dir is left out.

    A key that one config does not write has its default there, and None here.

    Raises:
        DataError: a file cannot be read.
    """
    flat = [_flatten(file) for file in files]
    keys = sorted(set().union(*flat) - {"output_dir"})
    rows = {key: [values.get(key) for values in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _flatten(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(
            f"{file} cannot be read ({reason}). vlm train writes it before the first step; was it removed or edited?"
        ) from None
    return {dotted(key): value for key, value in leaves(values)}


def as_table(comparison: Comparison) -> str:
    """How the runs stand, the metric at the same steps, and the keys that differ."""
    runs = comparison.summaries
    rows = [
        ["", *comparison.names],
        ["state", *(run.state for run in runs)],
        ["step", *(f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}" for run in runs)],
        ["loss", *(_short(run.loss) for run in runs)],
        ["held-out loss", *(_short(run.held_out_loss) for run in runs)],
        ["rows/s", *(_short(run.rows_per_second) for run in runs)],
        ["tokens/s", *(_short(run.tokens_per_second) for run in runs)],
        *([f"{comparison.metric}, to step {step:,}", *map(_short, means)] for step, means in comparison.places),
    ]
    text = lay_out(rows)
    if not comparison.differences:
        return f"{text}\n\nthe configs are equal"
    return f"{text}\n\nconfig ({_MISSING}: not written, the default holds):\n" + lay_out(
        [[key, *(_shown(value) for value in row)] for key, row in comparison.differences.items()]
    )


def draw(comparison: Comparison, path: Path) -> None:
    """The curves over each other, as a PNG: every step thin, the running mean thick, held-out losses as dots.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, series, held_out) in enumerate(
        zip(comparison.names, comparison.series, comparison.held_out, strict=True)
    ):
        colour = f"C{number % 10}"
        axes.plot(series.steps, series.values, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(series.steps, running_mean(series.values), color=colour, linewidth=1.6, label=name)
        if held_out.steps:
            axes.plot(held_out.steps, held_out.values, "o--", color=colour, markersize=4, label=f"{name}, held out")
    unit = "loss, nats per supervised token" if comparison.metric == "loss" else comparison.metric
    axes.set(xlabel="optimizer step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        raise DataError(f"--out {path}: cannot be written ({error}). Name a .png in a folder that exists") from None


def lay_out(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Lines of columns, those of `left` at their left edge, the others right.

    >>> print(lay_out([["", "a"], ["loss", "1.25"]]))
             a
    loss  1.25
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _places(series: Sequence[Series]) -> list[tuple[int, list[float | None]]]:
    """The same steps for all, up to the last that any run has."""
    last = max(max(each.steps, default=0) for each in series)
    edges = sorted({round(last * number / _NUM_PLACES) for number in range(_NUM_PLACES + 1)})
    return [(high, [_mean_between(each, low, high) for each in series]) for low, high in itertools.pairwise(edges)]


def _mean_between(series: Series, low: int, high: int) -> float | None:
    values = [value for step, value in zip(series.steps, series.values, strict=True) if low < step <= high]
    return sum(values) / len(values) if values else None


def _short(number: float | None) -> str:
    return _MISSING if number is None else f"{number:.4g}"


def _shown(value: Any) -> str:
    text = _MISSING if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:22]}...{text[-23:]}"
