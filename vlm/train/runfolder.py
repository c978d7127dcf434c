"""The folder of one run: checked and locked before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm.distributed import is_main, on_main
from vlm.errors import ConfigError, RunLocked
from vlm.files import write_atomically
from vlm.logs import warn
from vlm.train.checkpoint import clean_temporary
from vlm.train.ended import ENDED, OWNER

LOG = "train.log"  # what the console shows
LAUNCH = ".train.json"  # the process that `vlm studio` started; see vlm.apps.studio.jobs
LAUNCH_LOCK = ".jobs.lock"  # held while that file and its like are written
_LOOK_SECONDS = 0.5  # for which a reader may share the lock, as vlm.runs.is_locked does for a moment
_BEFORE_A_RUN = ("run.lock", OWNER, ENDED, LOG, LAUNCH, LAUNCH_LOCK)  # stand there before config.yaml does


class RunFolder:
    """Holds `<output_dir>` for one launch: rank 0 locks it and writes, the other ranks know where it is.

    Use as a context manager; the lock dies with the process.

    Raises:
        ConfigError: the path is not a folder, not writable, or holds files of something else.
        RunLocked: another process trains there now.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / "run.lock", timeout=_LOOK_SECONDS)

    def __enter__(self) -> RunFolder:
        on_main(self._take)
        return self

    def _take(self) -> None:
        self._check()
        owner = self.path / OWNER
        try:
            self._lock.acquire()
        except Timeout:
            raise RunLocked(
                f"{self.path}: another process is training here ({_describe_owner(owner)}). Wait for it, stop it, or "
                "give this run another folder with --options output_dir=..."
            ) from None
        write_atomically(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        clean_temporary(self.path)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def write_config(self, text: str) -> None:
        on_main(lambda: write_atomically(self.path / "config.yaml", text))

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a .jsonl file of the run, on rank 0. A full disk costs the line, not the run."""
        if not is_main():
            return
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            warn(f"{self.path / name}: a line could not be written ({error.strerror})")

    def rewind(self, name: str, step: int) -> None:
        """Drop the lines of a .jsonl file that a resumed run will write again: past `step`, or torn by a kill."""
        path = self.path / name
        if is_main() and path.exists():
            kept = [line for line in path.read_text("utf-8", "replace").split("\n") if _line_step(line) <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def _check(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output_dir: {path} is a file, not a folder. Name another with --options output_dir=...")
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / ".write-test").touch()
            (path / ".write-test").unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir: cannot write to {path} ({error.strerror}). Usually the folder belongs to another user or "
                "the disk is mounted read-only. Name another with --options output_dir=..."
            ) from None
        others = [p.name for p in path.iterdir() if p.name not in _BEFORE_A_RUN]
        if others and not (path / "config.yaml").exists():
            raise ConfigError(
                f"output_dir: {path} holds {', '.join(sorted(others)[:3])} but no config.yaml, so it is not a run of "
                "this program. Name another folder with --options output_dir=..."
            )


def _describe_owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "its process is not known"


def _line_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
