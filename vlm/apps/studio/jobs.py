"""Commands that run apart from the page: each in a session of its own, with a pid file and a log in its run folder.

All that is known of a job is read from there, so a page that opens later, or another server, sees the same.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from filelock import FileLock

from vlm.errors import RunLocked, VLMError
from vlm.files import write_atomically
from vlm.runs import is_locked
from vlm.train.ended import OWNER
from vlm.train.runfolder import LAUNCH, LAUNCH_LOCK, LOG

Kind = Literal["train", "export", "eval", "predict"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # training first
Begin = Callable[[Sequence[str], Path, Path], int]  # arguments of `vlm`, log, working directory -> process id
_TAIL_BYTES = 64 << 10
_LOCK_SECONDS = 10.0  # a start takes far less
_CLOCK_SECONDS = 2.0  # by which a process may seem younger than the file that names it


@dataclass(frozen=True)
class Job:
    """A command that was begun for a run."""

    kind: Kind
    pid: int
    host: str
    arguments: tuple[str, ...]  # of `vlm`
    created: float  # of the process, seconds since 1970: tells it from a later one of the same number
    code: int | None = None  # exit code; None while it runs, and when nobody was there to see its end
    folder: str | None = None  # working directory, from which relative paths of its config are; None: not known
    inode: int | None = None  # of the run folder: tells it from a copy, in which no process works; None: not known

    @property
    def command(self) -> str:
        return shlex.join(["vlm", *self.arguments])

    @property
    def is_running(self) -> bool:
        return self.code is None and _process_of(self.pid, self.host, self.created) is not None


def begin(
    run: Path, kind: Kind, arguments: Sequence[str], start: Begin | None = None, folder: Path | None = None
) -> Job:
    """Start a command for a run and return at once. Its output goes to the end of the job's log in the run folder.

    Args:
        arguments: of the `vlm` command.
        start: for tests; a process of its own session by default.
        folder: working directory; None is that of this process.

    Raises:
        RunLocked: such a job runs already, or another process trains there.
        VLMError: the folder cannot be written.
    """
    folder = Path.cwd() if folder is None else folder
    try:
        run.mkdir(parents=True, exist_ok=True)
        with _alone(run):
            _refuse_second(run, kind)
            log = log_file(run, kind)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {shlex.join(['vlm', *arguments])}\n")
            pid = (start or _start)(arguments, log, folder)
            created = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else time.time()
            inode = run.stat().st_ino
            job = Job(kind, pid, socket.gethostname(), tuple(arguments), created, folder=str(folder), inode=inode)
            _write(run, job)
    except OSError as error:
        raise VLMError(f"{run}: `vlm {kind}` could not be started ({error.strerror or error})") from None
    return job


def _alone(run: Path) -> FileLock:
    """Held from the look at a job file until it is written, so that of two clicks at once one starts a process."""
    return FileLock(run / LAUNCH_LOCK, timeout=_LOCK_SECONDS)


def _refuse_second(run: Path, kind: Kind) -> None:
    before = read(run, kind)
    if before is not None and before.is_running:
        raise RunLocked(f"{run}: `{before.command}` runs already (process {before.pid}). Stop it first")
    if kind == "train" and is_locked(run):
        raise RunLocked(f"{run}: another process is training here. Stop it first, or choose another output_dir")


def read(run: Path, kind: Kind) -> Job | None:
    """The last job of a kind that was begun for a run; None if there was none, or its file is damaged.

    Of a folder that was copied it is the original's, on no machine: it does not run here, whatever it does there.
    """
    try:
        values = json.loads(_job_file(run, kind).read_text(encoding="utf-8"))
        known = {name: values[name] for name in ("pid", "host", "created", "code")}
        later = {name: values.get(name) for name in ("folder", "inode")}  # which earlier versions did not write
        job = Job(kind, arguments=tuple(values["arguments"]), **known, **later)
        return job if job.inode in (None, run.stat().st_ino) else replace(job, host="")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop(run: Path) -> Job | None:
    """Ask what works in a run folder to end. Training finishes its step, saves, and exits with 143.

    Returns:
        the command that was begun after training, if one runs; then training goes on. None: training was asked.

    Raises:
        VLMError: nothing works there, or it trains on another machine.
    """
    running = [job for kind in reversed(KINDS) if (job := read(run, kind)) is not None and job.is_running]
    if running:  # training is the last
        os.kill(running[0].pid, signal.SIGTERM)
        return None if running[0].kind == "train" else running[0]
    owner = _read_owner(run)
    if owner is None or not is_locked(run):
        raise VLMError(f"{run}: nothing trains there now")
    if owner["host"] != socket.gethostname():
        raise VLMError(f"{run}: process {owner['pid']} on {owner['host']} trains there; stop it on that machine")
    if _process_of(owner["pid"], owner["host"], None) is None:
        raise VLMError(f"{run}: the folder is locked, but its process {owner['pid']} is not seen from here")
    os.kill(owner["pid"], signal.SIGTERM)
    return None


def log_file(run: Path, kind: Kind) -> Path:
    return run / (LOG if kind == "train" else f"{kind}.log")


def read_log(run: Path, kind: Kind = "train", lines: int = 200) -> str:
    """The last lines that a job printed; of a live line of a terminal, what it said last."""
    try:
        with log_file(run, kind).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n")[-lines:]).strip("\n")


def _job_file(run: Path, kind: Kind) -> Path:
    return run / (LAUNCH if kind == "train" else f".{kind}.json")


def _start(arguments: Sequence[str], log: Path, folder: Path) -> int:
    """A process that goes on when this one ends. While this one lives it is reaped, and its exit code noted."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        environment.pop(name, None)  # set for the page
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlm.cli.main", *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment,
            cwd=folder,
        )  # fmt: skip
    threading.Thread(target=_note_end, args=(process, log), daemon=True).start()
    return process.pid


def _note_end(process: subprocess.Popen[bytes], log: Path) -> None:
    code = process.wait()
    if not log.parent.is_dir():  # the run folder was removed meanwhile
        return
    with suppress(OSError), _alone(log.parent):
        for kind in KINDS:
            job = read(log.parent, kind)
            if log == log_file(log.parent, kind) and job is not None and job.pid == process.pid:
                _write(log.parent, replace(job, code=code))


def _write(run: Path, job: Job) -> None:
    values = {name: value for name, value in asdict(job).items() if name != "kind"}
    write_atomically(_job_file(run, job.kind), json.dumps(values) + "\n")


def _process_of(pid: int, host: str, created: float | None) -> psutil.Process | None:
    """A process of this machine that lives, and that began when it is said to have."""
    if host != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        is_same = created is None or abs(process.create_time() - created) < _CLOCK_SECONDS
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _read_owner(run: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads((run / OWNER).read_text(encoding="utf-8"))
        return owner if isinstance(owner["pid"], int) and isinstance(owner["host"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
