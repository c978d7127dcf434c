"""Named places where a test can break a running program on purpose.

`VLM_FAULT="point@step/rank=action[;...]"`, e.g. `save:manifest@20=kill` or `step@7/1=term`. Without `@step` the first
time counts, without `/rank` every rank. Processes that a launcher started again are left alone.
Actions: kill (SIGKILL to this process), term (SIGTERM to it), raise (RuntimeError), oom (torch's out-of-memory error),
nan (`fault` returns "nan" and the caller spoils its own number), sleep (for an hour). Without the variable every
call is a dictionary look-up.
"""

from __future__ import annotations

import os
import signal
import time
from contextvars import ContextVar

from vlm.launch import is_restarted, launched_rank

ACTIONS = ("kill", "term", "raise", "oom", "nan", "sleep")
_fired: set[str] = set()
_step = ContextVar("step", default=0)  # of each thread: a checkpoint is written while later steps are made


def set_step(step: int) -> None:
    """Tell the injector which optimizer step this thread is at."""
    _step.set(step)


def fault(point: str) -> str | None:
    """Do what VLM_FAULT asks for at this point and step, once. Returns the action, for those the caller must do."""
    plan = os.environ.get("VLM_FAULT")
    if not plan or is_restarted():
        return None
    for entry in plan.split(";"):
        place, _, action = entry.partition("=")
        place, _, rank = place.partition("/")
        name, _, at = place.partition("@")
        is_here = name == point and (not at or int(at) == _step.get()) and rank in ("", str(launched_rank()))
        if entry in _fired or not is_here:
            continue
        if action not in ACTIONS:
            raise ValueError(f"VLM_FAULT: action {action!r} in {entry!r}; known: {', '.join(ACTIONS)}")
        _fired.add(entry)
        return _act(point, action)
    return None


def _act(point: str, action: str) -> str | None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "sleep":
        time.sleep(3600)
    elif action == "oom":
        import torch

        raise torch.OutOfMemoryError("injected")
    elif action == "raise":
        raise RuntimeError(f"injected fault at {point}")
    return action
