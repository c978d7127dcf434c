"""What can be done with a run: each is a `vlm` command that is begun in its folder, or a signal to what runs there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlm.apps.studio import jobs
from vlm.errors import ConfigError, VLMError

Name = Literal["stop", "resume", "export", "evaluate", "predict"]
NAMES: tuple[Name, ...] = get_args(Name)
PREDICTIONS = "predictions"  # folder of a run into which `vlm predict` writes where nothing else is asked


@dataclass(frozen=True)
class Asked:
    """What the page asks of an export and of predictions; empty: as the command does by itself."""

    checkpoint: str = ""  # a step, or best
    is_full: bool = False
    max_shard_size: str = ""
    data: str = ""
    images: str = ""
    metrics: tuple[str, ...] = ()
    max_records: int | None = None
    out: str = ""  # name of a folder in that of the run

    @classmethod
    def read(cls, checkpoint: Any, is_full: Any, size: Any, data: Any, images: Any, metrics: Any, count: Any, out: Any):
        """What the components of the page hold. Raises ConfigError for what a command would not take for a value."""
        texts = [str(value or "").strip() for value in (checkpoint, size, data, images, out)]
        if wrong := [text for text in (texts[0], texts[1]) if text and not re.fullmatch(r"[\w.]+", text)]:
            raise ConfigError(f"{wrong[0]!r}: expected a checkpoint such as 500, and a size such as 2GB")
        if texts[4] and not re.fullmatch(r"[^./\\-][^/\\]*", texts[4]):
            raise ConfigError(f"{texts[4]!r}: expected the name of a folder, which is made in that of the run")
        if count and not (isinstance(count, int) and count > 0):
            raise ConfigError(f"{count!r} records: expected a number, or 0 for all")
        names = tuple(map(str, metrics)) if isinstance(metrics, list) else ()
        return cls(texts[0], bool(is_full), texts[1], texts[2], texts[3], names, count or None, texts[4])

    def of_export(self) -> list[str]:
        """Arguments of `vlm export`."""
        size, step = self.max_shard_size, self.checkpoint
        return [
            *(["--full"] if self.is_full else []),
            *(["--checkpoint", step] if step else []),
            *(["--max-shard-size", size] if size else []),
        ]

    def of_predict(self, run: Path) -> list[str]:
        """Arguments of `vlm predict`, with paths of this machine whatever folder the command begins in."""
        if not self.data:
            if self.images or self.metrics or self.max_records:
                raise ConfigError("images, metrics and a number of records are of a file of records: name one")
            return self._into(run)
        arguments = ["--data", _absolute(self.data)]
        arguments += ["--images", _absolute(self.images)] if self.images else []
        arguments += [part for metric in self.metrics for part in ("--metric", metric)]
        arguments += ["--max-records", str(self.max_records)] if self.max_records else []
        return arguments + self._into(run)

    def _into(self, run: Path) -> list[str]:
        return ["--out", str(run / self.out)] if self.out and self.out != PREDICTIONS else []


def begin(name: Name, run: Path, asked: Asked, start: jobs.Begin | None = None) -> jobs.Job:
    """Begin the command of anything but `stop`.

    Raises:
        VLMError: it cannot be begun, or not now.
    """
    place = run.resolve()
    kind: jobs.Kind = "eval" if name == "evaluate" else "train" if name == "resume" else name  # type: ignore[assignment]
    arguments = {
        "resume": lambda: _resume(place),
        "export": lambda: ["export", str(place), *asked.of_export()],
        "evaluate": lambda: ["eval", str(place), *_in(place)],
        "predict": lambda: ["predict", str(place), *asked.of_predict(place), *_in(place)],
    }[name]()
    return jobs.begin(run, kind, arguments, start, _working_directory(run))


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


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
