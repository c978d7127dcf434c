"""How the last launch of a run ended, in a file of its folder. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.errors import VLMError
from vlm.files import write_atomically
from vlm.logs import warn

OWNER = "run.owner.json"  # who holds the folder's lock, or held it last
ENDED = ".ended.json"
STOPPED = 143  # exit code of `vlm.errors.Preempted`
_MOST_CHARACTERS = 1000  # of an error that is kept


def write_end(run: Path, launch: int, error: Exception | None) -> None:
    """Keep the exit code and the error that a launch ends with. A full disk costs the file, not the error.

    Args:
        launch: the process id of its launcher.
        error: None where it has done all its steps.
    """
    code = 0 if error is None else error.exit_code if isinstance(error, VLMError) else 1
    text = "" if error is None else str(error) if isinstance(error, VLMError) else f"{type(error).__name__}: {error}"
    everywhere = isinstance(error, VLMError) and error.everywhere
    record = {"launch": launch, "code": code, "everywhere": everywhere, "error": text[:_MOST_CHARACTERS]}
    try:
        write_atomically(run / ENDED, json.dumps(record, ensure_ascii=False))
    except OSError as problem:
        warn(f"{run / ENDED} was not written ({problem.strerror}): vlm runs will call this run interrupted")


def read_end(run: Path) -> dict[str, Any]:
    """`launch`, `code`, `everywhere` and `error` of the last launch; empty where it was killed, or is at work.

    `everywhere`: all of its processes ended so on purpose, so that it is not to be started again.
    """
    owner = run / OWNER
    try:
        if owner.is_file() and (run / ENDED).stat().st_mtime_ns < owner.stat().st_mtime_ns:
            return {}  # of a launch before
        record = json.loads((run / ENDED).read_text(encoding="utf-8"))
        return {"everywhere": True, "error": "", **record}  # earlier versions wrote launch and code, and only then
    except (OSError, ValueError, TypeError):
        return {}
