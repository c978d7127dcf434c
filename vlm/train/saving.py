"""When a checkpoint is written: in its step, or copied there and written by a thread while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

from vlm.distributed import beside_training, gather_objects, world_size
from vlm.errors import CheckpointError
from vlm.faults import set_step
from vlm.launch import local_size
from vlm.logs import log, warn
from vlm.train.checkpoint import checkpoint_folder
from vlm.train.config import TrainConfig
from vlm.train.resume import RunState

_MEMORY_SHARE = 0.5  # of what is free, that a copy may take: training goes on beside it


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Every rank makes the same calls at the same steps.

    A full disk costs the checkpoint; the run, if it is the last one or `train.on_save_failure` says so.
    """

    def __init__(self, state: RunState, settings: TrainConfig) -> None:
        self.state = state
        self.settings = settings
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._step = 0
        self._written: Future[Path] | None = None  # of that step, while the thread has it
        self._told_of_memory = False

    def save(self, step: int, required: bool, wait: bool = False) -> Path | None:
        """Write the checkpoint of `step`, after the one that is being written.

        Args:
            required: it must be there when this returns; a failure is an error.
            wait: it should be there when this returns.

        Returns:
            its folder; None if it is still being written, or failed.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        before = self.finish()
        if before == checkpoint_folder(self.state.run, step):
            return before
        keep_last = self.settings.keep_last
        if required or wait or not self.settings.async_save or not self._fits_into_memory():
            return self._settle(step, required, partial(self.state.save, step, keep_last))
        self._step = step
        self._written = self._executor.submit(_beside, step, self.state.copy(step, keep_last))
        return None

    def look(self, step: int) -> None:
        """After each step: an error of the thread is raised here, as soon as the threads of all ranks are done."""
        if self._written is not None and all(gather_objects(self._written.done())):
            self.finish()

    def finish(self) -> Path | None:
        """Wait for the checkpoint that is being written. Raises what the thread ran into."""
        written, self._written = self._written, None
        return None if written is None else self._settle(self._step, False, written.result)

    def close(self) -> None:
        """Wait for the thread, when something else ends the run."""
        try:
            self.finish()
        except Exception as error:  # that other error says why the run ends
            warn(f"the checkpoint of step {self._step} was not written: {error}")
        self._executor.shutdown()

    def _settle(self, step: int, required: bool, write: Callable[[], Path]) -> Path | None:
        try:
            return write()
        except OSError as error:
            message = (
                f"checkpoint of step {step} could not be written to {self.state.run} ({error}); older ones are "
                "intact. Usually the disk is full: free space, or move output_dir"
            )
            if required or self.settings.on_save_failure == "stop":
                raise CheckpointError(message).on_every_rank() from None
            warn(f"{message}. Training goes on without it")
            return None

    def _fits_into_memory(self) -> bool:
        """Whether every rank may copy; each counts what its neighbours on the machine copy as what it does."""
        needed = self.state.engine.num_copied_bytes() * (local_size() or world_size())
        free = psutil.virtual_memory().available
        fits = all(gather_objects(needed <= _MEMORY_SHARE * free))
        if not fits and not self._told_of_memory:
            self._told_of_memory = True
            log(
                f"checkpoints are written in their step: a copy would take {needed / 2**30:.1f} GiB of the "
                f"{free / 2**30:.1f} GiB of memory that are free"
            )
        return fits


def _beside(step: int, write: Callable[[], Path]) -> Path:
    set_step(step)
    with beside_training():
        return write()
