"""What all pages of a studio share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlm.apps.studio import commands, jobs
from vlm.apps.web.texts import Language


@dataclass(frozen=True)
class Studio:
    """What all pages share.

    Args:
        runs: the folder whose runs are shown.
        begin: for tests; starts a process. None starts one of its own session.
        call: runs a command to its end.
    """

    runs: Path
    language: Language | None = None  # None: the browser's
    device: str = "auto"
    begin: jobs.Begin | None = None
    call: commands.Call = field(default=commands.call)
