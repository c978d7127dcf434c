"""One thread that owns the model, and the requests that come to it from the server's event loop."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from vlm.generation.batched import BatchedGenerator, Reply
from vlm.logs import log


@dataclass(eq=False)
class Job:
    """The replies of one request."""

    replies: list[Reply]


class Scheduler:
    """Runs a generator in a thread of its own. `submit` and `cancel` may be called from any thread.

    Args:
        around_step: what each step runs under, e.g. autocast, which is a setting of the thread.
    """

    def __init__(self, generator: BatchedGenerator, around_step: Callable[[], AbstractContextManager[Any]]) -> None:
        self._generator = generator
        self._around_step = around_step
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step. Replies that are still written get an error."""
        if self._thread.is_alive():
            self._commands.put(("stop", None))
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return len(self._generator.running)

    @property
    def num_waiting(self) -> int:
        return len(self._generator.waiting)

    @property
    def num_reserved(self) -> int:
        return self._generator.num_reserved

    @property
    def max_tokens(self) -> int:
        return self._generator.max_tokens

    def submit(self, job: Job) -> None:
        self._commands.put(("submit", job))
        if self._has_ended:
            self._refuse()

    def cancel(self, job: Job) -> None:
        self._commands.put(("cancel", job))

    def _run(self) -> None:
        busy = False
        try:
            while self._obey(wait=not busy):
                try:
                    with self._around_step():
                        busy = self._generator.step()
                except Exception as error:  # errors of one reply end there; this is one of the whole step
                    self._fail_all(error)
                    busy = False
        finally:  # in whatever way it ends, nobody waits for it
            self._has_ended = True
            self._generator.fail_all(RuntimeError("the server ends"))
            self._refuse()

    def _obey(self, wait: bool) -> bool:
        """Take in what was asked since the last step; False to end."""
        while True:
            try:
                command, job = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if job is None:
                return False
            for reply in job.replies:
                if command == "submit":
                    self._add(reply)
                else:
                    self._cancel(reply)

    def _add(self, reply: Reply) -> None:
        try:
            self._generator.add(reply)
        except Exception as error:
            reply.on_end(error)

    def _cancel(self, reply: Reply) -> None:
        try:
            self._generator.cancel(reply)
        except Exception as error:  # its slot may hold anything now
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        log(f"generation failed:\n{''.join(traceback.format_exception(error))}")
        self._generator.fail_all(error)

    def _refuse(self) -> None:
        """Tell the jobs that came too late."""
        with suppress(queue.Empty):
            while True:
                command, job = self._commands.get_nowait()
                for reply in job.replies if job is not None and command == "submit" else ():
                    reply.on_end(RuntimeError("the server ends"))
