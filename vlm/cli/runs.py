"""`vlm runs | compare | blame`: for one who trains many."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from vlm.cli.configs import Options
from vlm.cli.options import AsJson
from vlm.config_checks import load_checked
from vlm.errors import DataError


def register(app: typer.Typer) -> None:
    for command in (runs, compare, blame):
        app.command()(command)


def runs(
    folder: Annotated[Path | None, typer.Argument(help="Where to look; default: cache/runs, else here.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in and below a folder: state, step, loss, speed, hours left. Reads files only."""
    from vlm.compare import lay_out
    from vlm.runs import RunSummary, list_runs

    chosen = folder or (Path("cache/runs") if Path("cache/runs").is_dir() else Path())
    found = list_runs(chosen)
    if as_json:
        print(json.dumps([run.as_json() for run in found], indent=2, ensure_ascii=False))
        return
    if not found:
        raise DataError(f"no runs below {chosen}: name a folder that holds the output_dir of one")

    has_rewards = any(run.reward is not None for run in found)

    def row(run: RunSummary) -> list[str]:
        return [
            str(run.path),
            run.state,
            f"{run.step:,}" + (f"/{run.max_steps:,}" if run.max_steps else ""),
            _number(run.loss, ".4f"),
            *([_number(run.reward, ".4f")] if has_rewards else []),
            _number(run.held_out_loss, ".4f"),
            _number(run.rows_per_second, ".3g"),
            _number(run.hours_left, ".2f") if run.state != "finished" else "-",
            "-" if run.updated is None else _age(time.time() - run.updated),
        ]

    rewards = ["reward"] if has_rewards else []
    heads = ["run", "state", "step", "loss", *rewards, "held out", "rows/s", "hours left", "last step"]
    print(lay_out([heads, *map(row, found)]))
    for run in found:
        if run.error:
            print(f"{run.path}: {_first_sentence(run.error)}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Two or more run folders.")],
    metric: Annotated[str, typer.Option(help="A number of metrics.jsonl, such as grad_norm.")] = "loss",
    out: Annotated[Path, typer.Option(help="Where the curves are drawn.")] = Path("compare.png"),
    as_json: AsJson = False,
) -> None:
    """Draw the curves of runs over each other, and print where they and their configs differ."""
    from vlm.compare import as_table, compare_runs, draw

    comparison = compare_runs(folders, metric)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=2, ensure_ascii=False))
        return
    draw(comparison, out)
    print(as_table(comparison))
    print(f"\n{out}")


def blame(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int, typer.Option(help="The step, as metrics.jsonl counts.")],
    top: Annotated[int, typer.Option(min=1, help="Records to print.")] = 20,
    options: Options = None,
    as_json: AsJson = False,
) -> None:
    """Make a step of a run again, and rank its records by loss and gradient norm. Writes nothing into the run."""
    config = run / "config.yaml"
    if not config.is_file():
        raise DataError(f"{run} is not a run folder: it has no config.yaml. vlm runs lists those below a folder")
    checked = load_checked(str(config), [*(options or ()), f"output_dir={json.dumps(str(run))}"])
    from vlm.blame import blame_step, report

    found = blame_step(checked, step)
    print(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if as_json else "\n".join(report(found, top)))


def _first_sentence(error: str) -> str:
    r"""The first line, and where it ends with a colon what it announces.

    >>> _first_sentence("step 8: loss nan\nlower it"), _first_sentence("2 gates:\n  a: too low\n  b: too high\nUsual")
    ('step 8: loss nan', '2 gates: a: too low; b: too high')
    """
    first, *others = error.split("\n")
    if not first.endswith(":"):
        return first
    return f"{first} {'; '.join(line.strip() for line in others if line.startswith('  '))}".strip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _age(seconds: float) -> str:
    """
    >>> _age(42), _age(4000), _age(200000)
    ('42 s ago', '67 min ago', '56 h ago')
    """
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"
