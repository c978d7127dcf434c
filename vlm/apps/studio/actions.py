"""What can be done with a run: each is a `vlm` command that is begun in its folder, or a signal to what runs there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from vlm.apps.studio import jobs
from vlm.errors import ConfigError, VLMError

Name = Literal["stop", "resume", "export", "evaluate", "predict"]
NAMES: tuple[Name, ...] = get_args(Name)
KINDS: dict[Name, jobs.Kind] = {"resume": "train", "export": "export", "evaluate": "eval", "predict": "predict"}
EXPORT = "export"  # folder of a run that its commands take by themselves
PREDICTIONS = "predictions"


def begin(name: Name, run: Path, values: Sequence[Any] = (), start: jobs.Begin | None = None) -> jobs.Job:
    """Begin the command of anything but `stop`.

    Args:
        values: of the page's fields for it, as `of_export`, `of_evaluate` and `of_predict` take them.

    Raises:
        VLMError: it cannot be begun, or not now.
    """
    place = run.resolve()
    arguments = {
        "resume": lambda: _resume(place),
        "export": lambda: ["export", str(place), *of_export(*values)],
        "evaluate": lambda: ["eval", str(place), *of_evaluate(place, *values), *_in(place)],
        "predict": lambda: ["predict", str(place), *of_predict(place, *values), *_in(place)],
    }[name]()
    return jobs.begin(run, KINDS[name], arguments, start, _working_directory(run))


def of_export(checkpoint: Any = "", is_full: Any = False, max_shard_size: Any = "") -> list[str]:
    """Options of `vlm export`; empty fields leave out theirs.

    Raises:
        ConfigError: a field holds what cannot be one value of an option.
    """
    step, size = _word(checkpoint, "checkpoint", "500 or best"), _word(max_shard_size, "largest file", "2GB")
    return [
        *(["--full"] if is_full else []),
        *(["--checkpoint", step] if step else []),
        *(["--max-shard-size", size] if size else []),
    ]


def of_evaluate(run: Path, export: Any = "") -> list[str]:
    """Options of `vlm eval` for an export of the run by the name of its folder. Raises ConfigError."""
    name = _folder(export)
    return ["--export", str(run / name)] if name not in ("", EXPORT) else []


def of_predict(
    run: Path, export: Any = "", data: Any = "", images: Any = "", metrics: Any = (), count: Any = 0, out: Any = ""
) -> list[str]:
    """Options of `vlm predict`, with absolute paths, whatever folder the command begins in.

    Args:
        data: a file of records; empty: the tasks of the run's config.
        count: of records at most; 0: all.
        out: name of a folder in that of the run; empty: one for each export.

    Raises:
        ConfigError: a field holds what cannot be one value of an option, or is of `data`, which is empty.
    """
    if count and not (isinstance(count, int) and count > 0):
        raise ConfigError(f"{count!r} records: expected a number, or 0 for all")
    file, folder = str(data or "").strip(), str(images or "").strip()
    if not file and (folder or metrics or count):
        raise ConfigError("images, metrics and a number of records are of a file of records: name one")
    model, into = _folder(export), _folder(out)
    if not into and model not in ("", EXPORT):
        into = f"{PREDICTIONS}-{model.removeprefix(f'{EXPORT}-')}"
    return [
        *of_evaluate(run, model),
        *(["--data", _absolute(file)] if file else []),
        *(["--images", _absolute(folder)] if folder else []),
        *(part for metric in metrics or () for part in ("--metric", str(metric))),
        *(["--max-records", str(count)] if count else []),
        *(["--out", str(run / into)] if into else []),
    ]


def _word(value: Any, field: str, example: str) -> str:
    text = str(value or "").strip()
    if text and not re.fullmatch(r"\w[\w.]*", text):
        raise ConfigError(f"{field} {text!r}: expected such as {example}")
    return text


def _folder(value: Any) -> str:
    text = str(value or "").strip()
    if text and not re.fullmatch(r"\w[^/\\]*", text):
        raise ConfigError(f"{text!r}: expected the name of a folder in that of the run")
    return text


def _absolute(path: str) -> str:
    """A ~ that names no home stays."""
    return str(Path(os.path.expanduser(path)).resolve())


def _resume(run: Path) -> list[str]:
    """The command that began it, else one that reads the config it keeps; in this folder, wherever it lay then.

    Args:
        run: absolute.
    """
    job = jobs.read(run, "train")
    if not (run / "config.yaml").is_file():
        raise VLMError(f"{run}: it was never begun, so there is nothing to go on with; start it from its project")
    arguments = list(job.arguments) if job is not None else ["train", str(run / "config.yaml")]
    return arguments if arguments[-2:] == _in(run) else [*arguments, *_in(run)]


def _in(run: Path) -> list[str]:
    """The option that names this folder: its config may name another, from which it was copied or moved."""
    return ["--options", f"output_dir={json.dumps(str(run), ensure_ascii=False)}"]


def _working_directory(run: Path) -> Path | None:
    """Where the run was begun, so that relative paths of its data and models lead to the same files."""
    job = jobs.read(run, "train")
    return Path(job.folder) if job is not None and job.folder is not None and Path(job.folder).is_dir() else None
