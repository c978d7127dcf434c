"""What the run folders say, as the page shows it: states, curves, samples, figures. Reads files only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from vlm.apps.studio.jobs import KINDS, Job, read
from vlm.artifacts.evidence import FIGURES, figures_table
from vlm.artifacts.manifest import NAME
from vlm.errors import DataError
from vlm.runs import RunSummary, Series, State, find_runs, read_series, summarize
from vlm.train.ended import OWNER
from vlm.train.runfolder import LAUNCH

MAX_POINTS = 400  # of one curve that is sent to the page
_TAIL_BYTES = 64 << 10
_STOPPED = (143, -15)  # exit codes: after a save, and of a run that had not begun to train

Shown = State | Literal["starting", "not_started"]


@dataclass(frozen=True)
class Run:
    """A run as a line of the table."""

    label: str  # its path below the runs folder
    path: Path
    state: Shown  # starting: its process lives and has not locked the folder; not_started: that process is gone
    summary: RunSummary | None  # None before there is anything to sum up
    jobs: tuple[str, ...] = ()  # but for training, what runs now
    exports: tuple[str, ...] = ()  # names of their folders
    failed: Job | None = None  # what was begun last, if it failed; not training, whose state says so

    @property
    def is_training(self) -> bool:
        return self.state in ("starting", "running")

    @property
    def can_stop(self) -> bool:
        """Its training, or what was begun after it."""
        return self.is_training or bool(self.jobs)

    @property
    def can_resume(self) -> bool:
        return self.state in ("stopped", "failed", "interrupted") and (self.path / "config.yaml").is_file()


def list_runs(folder: Path) -> list[Run]:
    """Every run below a folder by its path, those that were only just started too."""
    paths = set(find_runs(folder)) | set(_launched(folder)) if folder.is_dir() else set()
    return [look_at(path, folder) for path in sorted(paths)]


def _launched(folder: Path) -> Iterator[Path]:
    """Folders in which a run was started from the studio, whatever became of it."""
    for where, folders, files in os.walk(folder):
        if LAUNCH in files or OWNER in files:
            folders.clear()
        if LAUNCH in files:
            yield Path(where)


def look_at(path: Path, folder: Path) -> Run:
    """One run.

    Args:
        folder: the runs folder, for its label.
    """
    label = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    last = {kind: job for kind in KINDS if (job := read(path, kind)) is not None}
    jobs = {kind: job for kind, job in last.items() if job.is_running}
    try:
        summary = summarize(path)
    except DataError:
        summary = None
    state: Shown = "not_started" if summary is None else summary.state
    if "train" in jobs and state != "running":
        state = "starting"
    elif state in ("interrupted", "not_started") and "train" in last and last["train"].code is not None:
        state = "stopped" if last["train"].code in _STOPPED else "failed"
    busy = tuple(kind for kind in jobs if kind != "train")
    latest = max(last.values(), key=lambda job: job.created, default=None)
    has_failed = latest is not None and latest.kind != "train" and latest.code not in (None, 0, *_STOPPED)
    exports = tuple(sorted(file.parent.name for file in path.glob(f"export*/{NAME}")))
    return Run(
        label if label != "." else path.name, path, state, summary, busy, exports, latest if has_failed else None
    )


def numbers_of(runs: Sequence[Path]) -> list[str]:
    """Names of the numbers that any of the runs has logged, loss first."""
    names = {name for run in runs for name in _series(run)}
    return sorted(names, key=lambda name: (name != "loss", name != "held_out_loss", name))


def curves(runs: Sequence[Run], name: str) -> dict[str, Series]:
    """A number of several runs, by their labels, each thinned to MAX_POINTS; runs that have it not are left out."""
    found = {run.label: _series(run.path).get(name) for run in runs}
    return {label: thinned(series) for label, series in found.items() if series is not None}


def thinned(series: Series, points: int = MAX_POINTS) -> Series:
    """Means over stretches of equal length, each at its last step; the last point is the last step's.

    >>> thinned(Series([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0]), points=2)
    Series(steps=[3, 5], values=[3.0, 8.0])
    """
    count = len(series.steps)
    if count <= points:
        return series
    edges = [-(-count * number // points) for number in range(points + 1)]
    stretches = list(pairwise(edges))
    means = [sum(series.values[start:end]) / (end - start) for start, end in stretches]
    return Series([series.steps[end - 1] for _, end in stretches], means)


def samples(run: Path, count: int = 12) -> list[dict[str, Any]]:
    """The last answers that a run wrote down, newest first; keys `step`, `prompt`, `image` and `answer`."""
    return _last_lines(run / "samples.jsonl", count)[::-1]


def predictions(run: Path, count: int = 50) -> list[dict[str, Any]]:
    """The last lines, `count` at most, of the file that was written last, in any folder of predictions of the run."""
    files = [file for file in run.glob("*/*.jsonl") if file.with_suffix(".json").is_file()]
    if not files:
        return []
    lines = _last_lines(max(files, key=lambda file: file.stat().st_mtime), count, 16 * _TAIL_BYTES)
    return [line for line in lines if "number" in line]


def figures(run: Path) -> str:
    """The evaluation table as Markdown; empty where none was made."""
    try:
        written = json.loads((run / FIGURES).read_text(encoding="utf-8"))
        return figures_table(written["results"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _series(run: Path) -> dict[str, Series]:
    try:
        return read_series(run)
    except DataError:
        return {}


def _last_lines(path: Path, count: int, num_bytes: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """The last objects of a file, `count` at most; not those torn at the beginning of the tail, or being written."""
    values = []
    for line in _tail(path, num_bytes)[-count - 1 :]:  # after the last line's end nothing stands, or what is written
        with suppress(ValueError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def _tail(path: Path, num_bytes: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            return file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return []
