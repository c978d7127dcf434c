"""What the folders of runs say: how each run stands, and its numbers. Reads files only, without torch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

from vlm.errors import DataError
from vlm.train.ended import OWNER, STOPPED, read_end

State = Literal["running", "finished", "stopped", "failed", "interrupted"]
METRICS = "metrics.jsonl"
_CONFIG, _LOCK = "config.yaml", "run.lock"
_TAIL_BYTES = 2**16  # of metrics.jsonl: enough for a hundred lines
_RATE_LINES = 20  # the last ones, whose mean is the rate
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError)


@dataclass(frozen=True)
class RunSummary:
    """How a run stands.

    running: a process holds the folder's lock. finished: all steps are made. stopped: by a signal, after a save.
    failed: it ended with an error. interrupted: its process is gone and nothing says how, usually a kill or a power
    failure. All but finished go on with the command that started them.

    Rates are means over the last lines of metrics.jsonl, None before the first one.
    """

    path: Path
    state: State
    step: int  # optimizer steps that metrics.jsonl has; without one, of the newest checkpoint
    max_steps: int | None  # None while the config counts epochs and there is no line yet
    epoch: float | None
    loss: float | None  # of the last step that has one
    held_out_loss: float | None  # the last one
    learning_rate: float | None
    step_seconds: float | None
    rows_per_second: float | None  # packed rows, over all ranks
    tokens_per_second: float | None
    images_per_second: float | None
    hours_left: float | None  # to max_steps at this rate, whether it runs or not
    updated: float | None  # when metrics.jsonl was last written, seconds since 1970
    error: str = ""  # what a failed run ended with
    reward: float | None = None  # of the replies of the last step; None where none are written

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None, as JSON has none."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in {**asdict(self), "path": str(self.path)}.items()
        }


@dataclass
class Series:
    """One number of a run over its steps: `values[i]` after `steps[i]` optimizer steps, in the order written."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def find_runs(folder: Path) -> list[Path]:
    """Run folders at and below a folder, sorted by path. What lies inside a run is not looked at, nor hidden folders.

    Raises:
        DataError: it is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name a run folder, or one below which runs lie, such as cache/runs")
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        if OWNER in files or {_CONFIG, METRICS} <= set(files):
            folders.clear()
            yield Path(where)
        folders[:] = [name for name in folders if not name.startswith(".")]


def list_runs(folder: Path) -> list[RunSummary]:
    """Every run at and below a folder, sorted by path; see `find_runs`."""
    return [summarize(run) for run in find_runs(folder)]


def summarize(run: Path) -> RunSummary:
    """How a run stands now. Reads the end of metrics.jsonl and a few small files, whatever the length of the run.

    Raises:
        DataError: the folder is not a run's.
    """
    if not (run / OWNER).is_file() and not (run / METRICS).is_file():
        raise DataError(
            f"{run} is not a run folder: it has neither {METRICS} nor {OWNER}. Name the output_dir of a run; "
            "vlm runs lists those below a folder"
        )
    settings = _read_settings(run / _CONFIG)
    lines = _last_lines(run / METRICS)
    training = [line for line in lines if "loss" in line]
    last = training[-1] if training else {}
    step, epoch = int(last.get("step", 0)) or _newest_checkpoint(run), _number(last.get("epoch"))
    max_steps = _count_steps(settings, step, epoch)
    seconds = _mean(training, "step_seconds")
    rows = settings["global_batch_size"]
    state, error = _state_of(run, step, max_steps)
    return RunSummary(
        path=run,
        state=state,
        step=step,
        max_steps=max_steps,
        epoch=epoch,
        loss=_last(training, "loss"),
        held_out_loss=_last(lines, "held_out_loss"),
        learning_rate=_number(last.get("learning_rate")),
        step_seconds=seconds,
        rows_per_second=rows / seconds if seconds and isinstance(rows, int) else None,
        tokens_per_second=_mean(training, "tokens_per_second"),
        images_per_second=_mean(training, "images_per_second"),
        hours_left=None if seconds is None or max_steps is None else max(0, max_steps - step) * seconds / 3600,
        updated=(run / METRICS).stat().st_mtime if (run / METRICS).is_file() else None,
        error=error,
        reward=_last(training, "reward"),
    )


def read_series(run: Path) -> dict[str, Series]:
    """Every number of metrics.jsonl by its name: loss, held_out_loss, grad_norm, learning_rate, tokens_per_second ...

    A step without a number, such as the loss of one that was not applied, is left out of its series. While the file
    stays as it is, the same series are returned again, so they are not to be changed.

    Raises:
        DataError: there is no metrics.jsonl. Usually the path is not a run folder, or no step was made yet.
    """
    path = run / METRICS
    if not path.is_file():
        raise DataError(f"{path} does not exist: {run} is not a run folder, or no step was made yet")
    about = path.stat()
    return dict(_series_of(path.resolve(), about.st_size, about.st_mtime_ns))


@lru_cache(maxsize=16)  # runs that pages draw now
def _series_of(path: Path, size: int, mtime_ns: int) -> dict[str, Series]:
    """Size and time tell the file from an earlier one at the same path."""
    found: dict[str, Series] = {}
    for line in _parse(path.read_bytes()):
        for name, value in line.items():
            number = _number(value)
            if name != "step" and number is not None:
                series = found.setdefault(name, Series())
                series.steps.append(line["step"])
                series.values.append(number)
    return found


def is_locked(run: Path) -> bool:
    """Whether a process trains in the folder. Looking shares the lock, so readers do not collide."""
    try:
        with (run / _LOCK).open("rb") as file:
            return not _can_share(file)
    except OSError:
        return False


def _can_share(file: BinaryIO) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _state_of(run: Path, step: int, max_steps: int | None) -> tuple[State, str]:
    if is_locked(run):
        return "running", ""
    ended = read_end(run)
    code = ended.get("code")
    if code == 0 or (code is None and max_steps is not None and 0 < max_steps <= step):
        return "finished", ""
    if code is None:
        return "interrupted", ""
    return ("stopped", "") if code == STOPPED else ("failed", ended["error"] or f"exit code {code}")


def _read_settings(path: Path) -> dict[str, Any]:
    """max_steps, epochs and global_batch_size of a run's config, None for what it does not say or hides."""
    try:
        values = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # 10 times as fast
        train = {key: values["train"].get(key) for key in ("max_steps", "epochs", "global_batch_size")}
    except _UNREADABLE:  # edited, or of something else
        return {"max_steps": None, "epochs": None, "global_batch_size": None}
    for key, value in train.items():
        if isinstance(value, str):
            train[key] = _resolved(values, f"train.{key}")
        elif value is None and key == "global_batch_size":
            from vlm.train.config import TrainConfig

            train[key] = TrainConfig.model_fields[key].default
    return train


def _resolved(values: dict[str, Any], key: str) -> Any:
    """What a reference leads to; None where that is not here, such as an environment variable."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.select(OmegaConf.create(values), key)
    except OmegaConfBaseException:
        return None


def _count_steps(settings: dict[str, Any], step: int, epoch: float | None) -> int | None:
    """Of the whole run; where its config counts epochs, from the steps that the epochs so far took."""
    if settings["max_steps"]:
        return int(settings["max_steps"])
    epochs = _number(settings["epochs"])
    if epochs is None or not epoch or not step:
        return None
    return step if epoch >= epochs else max(step + 1, round(step * epochs / epoch))


def _newest_checkpoint(run: Path) -> int:
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The lines in the last part of a file; what was torn at its beginning or is being written is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return list(_parse(file.read()))
    except FileNotFoundError:
        return []


def _parse(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.split(b"\n"):
        try:
            record = json.loads(line)
            if isinstance(record["step"], int):
                yield record
        except _UNREADABLE:
            continue


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    return next((number for line in reversed(lines) if (number := _number(line.get(name))) is not None), None)


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    numbers = [number for line in lines[-_RATE_LINES:] if (number := _number(line.get(name))) is not None]
    return sum(numbers) / len(numbers) if numbers else None
