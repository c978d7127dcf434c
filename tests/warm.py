"""Processes that begin with torch, transformers, peft and DeepSpeed imported, which takes 10 seconds of a slow CPU.

They are forked from a server that imports those once (multiprocessing's "forkserver"), so what they do is what a fresh
process does. Tests of the launcher itself start real ones: see `launched`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
_processes = multiprocessing.get_context("forkserver")


@dataclass
class Ranks:
    """The processes of one launch, and the files that they print into."""

    processes: list[Any] = field(default_factory=list)
    folder: Path = Path()

    @property
    def codes(self) -> list[int | None]:
        """Exit statuses; None while a process runs, -9 of one that was killed."""
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """What all of them printed, errors too."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.iterdir()))

    def wait(self, timeout: float) -> None:
        """Until all have ended; the others get 20 seconds after one has failed. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while None in self.codes and time.monotonic() < end:
            if any(self.codes):
                end = min(end, time.monotonic() + 20)
            time.sleep(0.02)
        if None in self.codes and not any(self.codes):
            raise TimeoutError(f"not all ended within {timeout:g} s: {self.codes}\n{self.output[-6000:]}")

    def kill(self) -> None:
        """Those that run, with the processes that they started."""
        for process in self.processes:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()


@contextmanager
def started(work: Callable[..., None], *arguments: Any, nproc: int = 1, **environment: str) -> Iterator[Ranks]:
    """`work(*arguments)` in processes of their own, each the leader of a process group; killed at the end.

    Args:
        work: a function of a module that can be imported.
        nproc: with more than one, they find the variables that torchrun sets.
        environment: variables besides those of this process.
    """
    import torch.distributed as dist

    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        ranks = Ranks(folder=Path(folder))
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if nproc > 1 else None
        start_server()
        try:
            for rank in range(nproc):
                launch = {} if store is None else _launch_variables(rank, nproc, store.port)
                task = (ranks.folder / f"{rank}", {**os.environ, **launch, **environment}, work, arguments)
                ranks.processes.append(_processes.Process(target=_enter, args=task))
                ranks.processes[-1].start()
            yield ranks
        finally:
            ranks.kill()


def run_warm(
    work: Callable[..., None], *arguments: Any, nproc: int = 1, timeout: float = 200, **environment: str
) -> tuple[int, str]:
    """The exit status (of the first process that failed, if one did) and what was printed."""
    with started(work, *arguments, nproc=nproc, **environment) as ranks:
        ranks.wait(timeout)
        return next((code for code in ranks.codes if code), 0), ranks.output


def begin(arguments: Sequence[str], log: Path, folder: Path) -> int:
    """`vlm` with these arguments in a working directory and a session of its own; what it prints is added to a file.

    Returns:
        its number.
    """
    start_server()
    process = _processes.Process(target=_enter, args=(log, {**os.environ}, vlm, tuple(arguments), "a", folder))
    process.start()
    return process.pid


def start_server() -> None:
    """If it does not run. It looks for modules in PYTHONPATH only."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    try:
        _processes.set_forkserver_preload(["warm_imports"])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _launch_variables(rank: int, nproc: int, port: int) -> dict[str, str]:
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    sizes = {name: str(nproc) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return ranks | sizes | store


def _enter(
    log: Path, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...], mode: str = "w",
    folder: Path | None = None,
) -> None:  # fmt: skip
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # processes of its own begin as those of a fresh process
    with log.open(mode) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    work(*arguments)
    sys.stdout.flush()


def train(*arguments: str) -> None:
    """`vlm train` with these arguments, as `work`."""
    vlm("train", *arguments)


def vlm(*arguments: str) -> None:
    """`vlm` with these arguments, as `work`."""
    from vlm.cli.main import main

    main(arguments)
